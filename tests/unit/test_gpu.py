"""The handlers on a GPU. Without one, all tests here but one are skipped."""

from pathlib import Path

import pytest
import torch

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder, select
from bundle.samples import first
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


@on_gpu
def test_measure_case_with_a_gpu_times_both_devices():
    timings = list(measure_case(CASES["mnist"], ["cpu", "0"], (1, 64), seconds=1))
    assert [(timing.device, timing.batch) for timing in timings] == [("cpu", 1), ("0", 1), ("cpu", 64), ("0", 64)]
