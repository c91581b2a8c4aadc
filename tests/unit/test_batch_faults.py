"""Batches under overload, without enough memory, and on a broken device."""

import time

import pytest
import torch
from torch import Tensor

from bundle.build.dryrun import DryRun
from handlers.core import device
from tests.unit.numbered import BATCH_SIZE, SLOW_SECONDS, approximately, row


@pytest.fixture
def limited(worker: DryRun, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """Return a worker behind a proxy, whose requests may wait for one second."""
    monkeypatch.setattr(worker.handler, "behind_proxy", True)
    impatient = worker.handler.settings.model_copy(update={"max_wait_seconds": 1.0})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    return worker


def test_request_past_its_wait_limit_is_rejected_only_in_a_full_batch(limited: DryRun):
    now = time.time()
    waited = [0.0, 1.5, 0.5, 30.0]
    headers = [{"X-Request-Start": f"t={now - seconds:.3f}"} for seconds in waited] + [{}] * (BATCH_SIZE - len(waited))
    rows = [row(index) for index in range(BATCH_SIZE)]
    answers = limited.predict(rows, headers)
    assert [status for status, _ in answers] == [200, 429, 200, 429, *[200] * (BATCH_SIZE - len(waited))]
    assert answers[1][1] == answers[3][1]
    assert (answers[1][1]["type"], "Retry-After" in answers[1][1]["message"]) == ("Overloaded", True)
    assert answers[4][1] == approximately(limited.predict([row(4)])[0][1])
    # no request waits behind a batch that is not full
    assert [status for status, _ in limited.predict(rows[:-1], headers[:-1])] == [200] * (BATCH_SIZE - 1)


IN_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter.\n...\nRuntimeError: "
NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
OUT_OF_MEMORY = [torch.OutOfMemoryError(NO_ROOM), RuntimeError(IN_TORCHSCRIPT + NO_ROOM)]
BROKEN = [torch.AcceleratorError(ILLEGAL), RuntimeError(IN_TORCHSCRIPT + ILLEGAL)]


def test_decoding_past_its_time_limit_rejects_the_remaining_requests(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    """Without this limit, valid inputs could together take so long that TorchServe kills the worker."""
    impatient = worker.handler.settings.model_copy(update={"max_decode_seconds": SLOW_SECONDS / 2})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    rows = [row(0), {"body": b"slow"}, row(2), {"instances": [row(3)["body"]]}]
    answers = worker.predict(rows)
    assert [status for status, _ in answers] == [200, 200, 429, 429]
    assert [body["type"] for _, body in answers[2:]] == ["Overloaded"] * 2
    assert answers[0] == (200, approximately(worker.predict([row(0)])[0][1]))
    [(status, body)] = worker.predict([{"instances": [b"slow", row(1)["body"]]}])
    assert (status, body["type"]) == (429, "Overloaded")


def test_running_past_its_time_limit_rejects_the_remaining_instances(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    """The first run is always made, so that a model that is slower than the limit answers."""
    impatient = worker.handler.settings.model_copy(update={"max_inference_seconds": SLOW_SECONDS / 2})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    monkeypatch.setattr(worker.handler, "run_size", 2)
    model = worker.handler.model

    def slow(numbers: torch.Tensor) -> torch.Tensor:
        time.sleep(SLOW_SECONDS)
        return model(numbers)

    monkeypatch.setattr(worker.handler, "model", slow)
    answers = worker.predict([row(0), row(1), {"instances": [row(2)["body"], row(3)["body"]]}, row(4)])
    assert [status for status, _ in answers] == [200, 200, 429, 429]
    assert answers[2][1]["type"] == "Overloaded"


def test_reading_past_the_time_limit_of_decoding_rejects_the_remaining_requests(
    worker: DryRun, monkeypatch: pytest.MonkeyPatch
):
    impatient = worker.handler.settings.model_copy(update={"max_decode_seconds": SLOW_SECONDS / 2})
    monkeypatch.setattr(worker.handler, "settings", impatient)
    read, rows_read = worker.handler.read, []

    def slow(own: dict, headers: object) -> object:
        rows_read.append(own)
        time.sleep(SLOW_SECONDS)
        return read(own, headers)

    monkeypatch.setattr(worker.handler, "read", slow)
    answers = worker.predict([row(0), row(1), row(2)])
    assert [status for status, _ in answers] == [429] * 3
    assert len(rows_read) == 1


def test_torchscript_error_is_a_plain_runtime_error():
    """The errors above imitate this one, of a real TorchScript module."""

    @torch.jit.script
    def allocate(numbers: Tensor) -> Tensor:
        return torch.empty([numbers.size(0), 1 << 50])

    with pytest.raises(RuntimeError, match="(?s)TorchScript interpreter.*allocate") as caught:
        allocate(torch.zeros(8))
    assert type(caught.value) is RuntimeError


@pytest.fixture(params=OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def small_device(worker: DryRun, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Imitate a device with too little memory, and return the sizes of the batches that it ran.

    It has memory for two inputs, and not for an input whose first number is above 40.
    """
    model, ran = worker.handler.model, []

    def run(numbers: Tensor) -> Tensor:
        if len(numbers) > 2 or numbers[:, 0].max() > 40:
            raise request.param
        ran.append(len(numbers))
        return model(numbers)

    monkeypatch.setattr(worker.handler, "model", run)
    return ran


def test_batch_that_exceeds_the_memory_is_halved(
    worker: DryRun, small_device: list[int], caplog: pytest.LogCaptureFixture
):
    rows = [row(index) for index in (1, 2, 3, 50, 4, 5, 6)]
    answers = worker.predict(rows)
    assert [status for status, _ in answers] == [200, 200, 200, 507, 200, 200, 200]
    assert answers[3][1]["type"] == "InsufficientMemory"
    assert max(small_device) == 2
    assert "7 inputs of numbers do not fit" in caplog.text
    for index, one in enumerate(rows):
        if index != 3:
            assert answers[index][1] == approximately(worker.predict([one])[0][1])


def test_instance_that_exceeds_the_memory_fails_its_request(worker: DryRun, small_device: list[int]):
    answers = worker.predict([{"instances": [row(1)["body"], row(50)["body"]]}, row(2)])
    assert [status for status, _ in answers] == [507, 200]


def test_memory_error_of_python_fails_the_batch_with_507(worker: DryRun, monkeypatch: pytest.MonkeyPatch):
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker.handler, "decode", fail)
    assert [status for status, _ in worker.predict([row(0), row(1)])] == [507, 507]


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_broken_device_ends_the_worker(worker: DryRun, monkeypatch: pytest.MonkeyPatch, error: Exception):
    """TorchServe's worker does not catch `SystemExit`: its process ends, and the frontend starts another."""

    def fail(numbers: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(worker.handler, "model", fail)
    with pytest.raises(SystemExit):
        worker.predict([row(0)])


def test_device_errors_are_told_from_bugs():
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device.is_broken(torch.AcceleratorError("CUDA error: out of memory"))
    assert device.is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    for library in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "cuFFT error: CUFFT_ALLOC_FAILED",
    ):
        assert device.is_out_of_memory(RuntimeError(library))
        assert not device.is_broken(RuntimeError(library))
    assert device.is_broken(RuntimeError("CUDA driver error: an illegal memory access was encountered"))
    for bug in (RuntimeError("shape '[4]' is invalid"), ValueError("CUDA error: so a text says")):
        assert not device.is_out_of_memory(bug)
        assert not device.is_broken(bug)


def test_memory_that_the_cpu_does_not_have_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert device.is_out_of_memory(raised.value)
