"""The handlers on a GPU. Without one, the tests that need it are skipped."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from ts.torch_handler.base_handler import BaseHandler

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder, select
from bundle.samples import first
from handlers.core import device, precision
from handlers.core.batch import BatchHandler
from loadtest.bench.cases import CASES
from loadtest.bench.devices import measure_case
from tests.shipped import SHIPPED

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def answers(folder: ModelFolder, mar: Path, size: int, gpu: int | None) -> list[dict]:
    content = folder.sample_file.read_bytes()
    with DryRun(mar, gpu=gpu) as worker:
        assert worker.handler.device.type == ("cpu" if gpu is None else "cuda")
        found = worker.predict([{"body": content} for _ in range(size)])
    assert [status for status, _ in found] == [200] * size
    return [body for _, body in found]


@on_gpu
@pytest.mark.parametrize("size", [1, 5, 32])
@pytest.mark.parametrize("model", SHIPPED)
def test_gpu_answers_like_the_cpu(model: str, size: int, tmp_path: Path):
    [folder] = select([model])
    mar = archive(folder, store=tmp_path).path
    [expected] = answers(folder, mar, 1, None)
    for answer in answers(folder, mar, size, 0):
        assert first(answer).label == first(expected).label
        assert first(answer).probability == pytest.approx(first(expected).probability, abs=0.03)


@on_gpu
def test_to_device_on_a_gpu_copies_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [folder] = select(["mnist"])
    copied, copy = [], torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        copied.append((tensor.is_pinned(), options))
        return copy(tensor, *arguments, **options)

    with DryRun(archive(folder, store=tmp_path).path, gpu=0) as worker:
        monkeypatch.setattr(torch.Tensor, "to", to)
        moved = worker.handler.to_device(torch.arange(6).view(2, 3))
        assert copied == [(True, {"non_blocking": True})]
        assert moved.is_cuda
        assert moved.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_to_device_pins_inputs_only_for_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Memory cannot be pinned without a GPU, so the two calls are recorded instead of made."""
    given, pinned, calls = torch.zeros(2), torch.ones(2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned if tensor is given else tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, **options: calls.append((tensor is pinned, device, options))
    )
    handler = BatchHandler()
    handler.device = torch.device("cuda", 0)
    handler.to_device(given)
    assert calls == [(True, handler.device, {"non_blocking": True})]
    handler.device = torch.device("cpu")
    handler.to_device(given)
    assert calls[1:] == [(False, handler.device, {"non_blocking": True})]


def test_select_makes_only_a_gpu_the_current_device(monkeypatch: pytest.MonkeyPatch):
    selected: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    device.select(torch.device("cpu"))
    device.select(torch.device("cuda", 1))
    assert selected == [torch.device("cuda", 1)]


def test_worker_on_a_gpu_selects_it_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [folder] = select(["mnist"])
    mar = archive(folder, store=tmp_path).path
    load = BaseHandler.initialize

    def loaded_on_a_gpu(handler: BaseHandler, context: object) -> None:
        load(handler, context)
        handler.device = torch.device("cuda", 1)

    def stop_at(chosen: torch.device) -> None:
        raise InterruptedError(str(chosen))

    monkeypatch.setattr(BaseHandler, "initialize", loaded_on_a_gpu)
    monkeypatch.setattr(torch.cuda, "set_device", stop_at)
    with pytest.raises(InterruptedError, match="cuda:1"):
        DryRun(mar)


@torch.inference_mode()
def test_module_that_a_gpu_fuser_breaks_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """The fuser compiles in the second run; a failure must not reach the measurement, where it would end the worker."""
    runs: list[Tensor] = []

    def fused(inputs: Tensor) -> Tensor:
        runs.append(inputs)
        if len(runs) % 3 == 2:
            raise RuntimeError("NVRTC compilation failed")
        return inputs

    monkeypatch.setattr(precision, "freeze", lambda *_: fused)
    model, inputs = torch.jit.script(torch.nn.Identity()), (torch.ones(2),)
    with pytest.raises(RuntimeError, match="NVRTC"):
        precision.freeze_checked(model, "bfloat16", torch.device("cuda"), inputs, inputs[0])


def test_float32_on_a_gpu_may_differ_by_the_rounding_of_tf32():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert precision.max_error("float32", gpu) > precision.max_error("float32", cpu)
    assert precision.max_error("bfloat16", gpu) == precision.max_error("bfloat16", cpu)


@on_gpu
def test_measure_case_with_a_gpu_times_both_devices():
    timings = list(measure_case(CASES["mnist"], ["cpu", "0"], (1, 64), seconds=1))
    assert [(timing.device, timing.batch) for timing in timings] == [("cpu", 1), ("0", 1), ("cpu", 64), ("0", 64)]
