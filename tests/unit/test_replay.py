"""Recordings of batch sizes, on the CPU: a function stands for the graph, as both work on the recorded memory.

Recordings on a GPU are tested in test_gpu.py.
"""

import logging
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from handlers.core import replay
from handlers.core.replay import NotReplayable, Recording, Replayed, check_batched, recorded_sizes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WIDTH = 3


def module(inputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Compute each row by itself."""
    return {"sums": (inputs * weights).sum(1), "doubled": inputs * 2}


def batch(rows: int, start: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.arange(rows * WIDTH).view(rows, WIDTH) + start, torch.full((rows, WIDTH), 0.5)


class Recorder:
    """Makes recordings of `module`, and keeps the sizes that were replayed or run."""

    def __init__(self, *sizes: int):
        self.replays: list[int] = []
        self.runs: list[int] = []
        self.replayed = Replayed(self.run, [self.recording(size) for size in sizes])

    def run(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.runs.append(len(inputs[0]))
        return module(*inputs)

    def recording(self, size: int) -> Recording:
        inputs = batch(size, start=100.0)
        outputs = module(*inputs)

        def graph() -> None:
            self.replays.append(size)
            for name, value in module(*inputs).items():
                outputs[name].copy_(value)

        return Recording(graph, inputs, outputs)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_batch_is_padded_to_the_next_recorded_size_and_answered_without_the_padding(rows: int, size: int):
    recorder = Recorder(4, 1, 8)
    assert recorder.replayed.sizes == [1, 4, 8]
    assert equal(recorder.replayed(*batch(rows)), module(*batch(rows)))
    assert (recorder.replays, recorder.runs) == ([size], [])


def test_outputs_are_not_changed_by_the_next_batches():
    recorder = Recorder(4)
    first = recorder.replayed(*batch(4))
    second = recorder.replayed(*batch(2, start=7.0))
    assert equal(first, module(*batch(4)))
    assert equal(second, module(*batch(2, start=7.0)))


def test_smaller_batch_after_a_larger_one_does_not_get_its_rows():
    recorder = Recorder(4)
    recorder.replayed(*batch(4, start=50.0))
    assert equal(recorder.replayed(*batch(1)), module(*batch(1)))


@pytest.mark.parametrize(
    "inputs",
    [
        batch(9),
        (torch.ones(2, WIDTH + 1), torch.ones(2, WIDTH + 1)),
        (torch.ones(2, WIDTH, dtype=torch.float64), torch.ones(2, WIDTH)),
        (torch.ones(2, WIDTH), torch.ones(1, WIDTH)),
        (torch.ones(2, WIDTH), torch.tensor(1.0)),
    ],
    ids=["too many rows", "another shape", "another dtype", "rows that differ", "no rows"],
)
def test_batch_that_no_recording_fits_is_run_as_usual(inputs: tuple[Tensor, ...]):
    recorder = Recorder(4, 8)
    recorder.replayed.module = lambda *given: given
    assert recorder.replayed(*inputs) == inputs
    assert not recorder.replays


def test_fewer_inputs_than_recorded_are_run_as_usual():
    recorder = Recorder(4)
    recorder.replayed.module = lambda *given: given
    [given] = recorder.replayed(batch(2)[0])
    assert torch.equal(given, batch(2)[0])
    assert not recorder.replays


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 8, 31, 32, 100, 256])
def test_recorded_sizes_reach_the_largest_and_pad_by_less_than_half(largest: int):
    sizes = recorded_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    for rows in range(1, largest + 1):
        assert next(size for size in sizes if size >= rows) < 1.5 * rows or rows in sizes
    assert len(sizes) <= 2 * largest.bit_length()


@pytest.mark.parametrize(
    "values",
    [torch.ones(3, 2), torch.tensor(1.0), [torch.ones(4)], (torch.ones(4), 7), {"a": torch.ones(4, 1), "b": None}, ()],
    ids=["rows", "no rows", "list", "number", "missing value", "nothing"],
)
def test_values_without_a_row_for_each_sample_cannot_be_recorded(values: object):
    with pytest.raises(NotReplayable, match="one row for each of 4 samples"):
        check_batched(values, 4)


def test_values_with_a_row_for_each_sample_can_be_recorded():
    check_batched((torch.ones(4), {"a": torch.ones(4, 2), "b": (torch.ones(4, 1, 1),)}), 4)


def test_worker_without_a_gpu_runs_its_module_and_warns(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert replay.replayed(module, batch, 8, CPU, "numbers") is module
    assert "numbers runs without CUDA graphs" in caplog.text
    assert "the worker has no GPU" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the recording succeeds")
def test_recording_that_fails_in_pytorch_leaves_the_module_and_says_why(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert replay.replayed(module, batch, 8, GPU, "numbers") is module
    [message] = [record.getMessage() for record in caplog.records]
    assert "NVIDIA driver" in message


def test_worker_with_graphs_set_and_without_a_gpu_answers_as_without_the_setting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    [folder] = select(["mnist"])
    plain, changed = archive(folder, store=tmp_path).path, tmp_path / "changed.mar"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "model-config.yaml":
                config = yaml.safe_load(content)
                config.setdefault("handler", {})["cuda_graphs"] = True
                content = yaml.safe_dump(config).encode()
            target.writestr(name, content)
    rows = [{"body": folder.sample_file.read_bytes()}] * 3
    with caplog.at_level(logging.WARNING), DryRun(plain) as without, DryRun(changed) as worker:
        assert worker.handler.settings.cuda_graphs
        assert worker.predict(rows) == without.predict(rows)
    assert "mnist runs without CUDA graphs (set cuda_graphs: false): the worker has no GPU" in caplog.text


def test_reason_of_a_failed_recording_is_the_first_error():
    def fail() -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("ending the recording failed")

    with pytest.raises(RuntimeError) as raised:
        fail()
    assert replay.first_reason(raised.value) == "operation not permitted when stream is capturing"
