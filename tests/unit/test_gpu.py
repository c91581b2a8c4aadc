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
from handlers.core import device, precision, replay
from handlers.core.staging import Staging
from loadtest.bench.cases import CASES
from loadtest.bench.devices import measure_case
from tests.shipped import SHIPPED

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda", 0)


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
def test_staging_on_a_gpu_stacks_into_the_memory_that_is_copied(monkeypatch: pytest.MonkeyPatch):
    copied, copy = [], torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        copied.append((tensor.data_ptr(), tensor.is_pinned(), options))
        return copy(tensor, *arguments, **options)

    staging = Staging(GPU)
    stacked = staging.stack([torch.arange(3), torch.arange(3, 6)])
    monkeypatch.setattr(torch.Tensor, "to", to)
    for tensor in (stacked, torch.arange(6).view(2, 3)):
        moved = staging.to_device(tensor)
        assert moved.is_cuda
        assert moved.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied[0] == (stacked.data_ptr(), True, {"non_blocking": True})
    assert copied[1][1:] == (True, {"non_blocking": True})


@on_gpu
def test_staging_on_a_gpu_reuses_memory_but_not_before_its_copy_ended():
    staging = Staging(GPU)
    torch.cuda._sleep(200_000_000)  # cycles: the copies start only after it
    places, moved = set(), []
    for number in range(20):
        batch = staging.stack([torch.full((100_000,), number)] * 2)
        places.add(batch.data_ptr())
        moved.append(staging.to_device(batch))
        del batch
    assert [each.unique().tolist() for each in moved] == [[number] for number in range(20)]
    torch.cuda.synchronize()
    assert staging.stack([torch.zeros(100_000, dtype=torch.int64)] * 2).data_ptr() in places


@on_gpu
def test_staging_on_a_gpu_copies_any_outputs_to_the_host():
    outputs = {"a": torch.arange(6, device=GPU).view(2, 3).T, "b": (torch.ones(2, device=GPU), [torch.zeros(0)])}
    copied = Staging(GPU).to_host(outputs)
    assert copied["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["b"][0].tolist() == [1, 1]
    assert copied["a"].is_pinned()
    assert not copied["b"][0].is_cuda


@on_gpu
@torch.inference_mode()
def test_replay_on_a_gpu_answers_like_the_module(tmp_path: Path):
    [folder] = select(["mnist"])
    with DryRun(archive(folder, store=tmp_path).path, gpu=0) as worker:
        handler, module = worker.handler, worker.handler.model
        handler.model = replay.replayed(module, handler.example_batch, handler.run_size, handler.device, "mnist")
        assert isinstance(handler.model, replay.Replayed), "it was not recorded"
        [sample] = worker.decode({"body": folder.sample_file.read_bytes()})
        kept = []
        for size in (1, 5, handler.run_size, 2):
            batch = tuple(map(handler.staging.to_device, handler.collate([sample] * size)))
            kept.append((handler.model(*batch), module(*batch)))
        for replayed, expected in kept:
            assert precision.relative_error(replayed, expected) < 0.02


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


@on_gpu
@torch.inference_mode()
def test_module_that_waits_for_the_gpu_is_run_without_graphs(caplog: pytest.LogCaptureFixture):
    """The last test: no further recording is possible in this process."""

    def waiting(inputs: Tensor) -> Tensor:
        return inputs * inputs.sum().item()

    stream = torch.cuda.current_stream()
    module = replay.replayed(waiting, lambda size: (torch.ones(size, 2, device=GPU),), 4, GPU, "waiting")
    assert module is waiting
    assert "waiting runs without CUDA graphs" in caplog.text
    assert torch.cuda.current_stream() == stream
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, device=GPU)
    torch.cuda.empty_cache()  # as after an input that does not fit
    assert module(torch.ones(2, 2, device=GPU)).tolist() == [[4, 4], [4, 4]]
    assert replay.replayed(torch.sin, lambda size: (torch.ones(size, 2, device=GPU),), 4, GPU, "next") is torch.sin
    assert "an earlier recording failed" in caplog.text
