"""`make bench-gpu`, on the device that every machine has."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bundle.build.dryrun import DryRun
from handlers.core.batch import BatchHandler
from loadtest.bench import devices
from loadtest.bench.cases import CASES
from loadtest.bench.devices import Timing, app, measure_case, rows
from loadtest.bench.limit import dry_run
from tests.programs import run


class Watched(dict[str, list[int]]):
    """How many samples each call of a worker's `decode` and `collate` had."""

    def __init__(self, worker: DryRun):
        super().__init__(decode=[], collate=[])
        for name, samples in (("decode", lambda _: 1), ("collate", len)):
            self.watch(worker.handler, name, samples)

    def watch(self, handler: BatchHandler, name: str, samples: Callable[[object], int]) -> None:
        method = getattr(handler, name)

        def watched(argument: object) -> object:
            self[name].append(samples(argument))
            return method(argument)

        setattr(handler, name, watched)

    def clear(self) -> None:
        for calls in self.values():
            calls.clear()


@pytest.fixture(scope="module")
def text_worker() -> Iterator[DryRun]:
    with dry_run(CASES["text"]) as worker:
        yield worker


def test_a_worker_is_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    watched: list[Watched] = []

    def watched_worker(*arguments: object) -> DryRun:
        worker = dry_run(*arguments)
        watched.append(Watched(worker))
        return worker

    monkeypatch.setattr(devices, "dry_run", watched_worker)
    timings = []
    for timing in measure_case(CASES["text"], ["cpu"], (1, 8), seconds=0.5):
        timings.append((timing.batch, timing.device))
        assert set(watched[0]["collate"]) == {timing.batch}, "the worker did not answer whole batches"
        watched[0].clear()
        assert timing.inference_seconds > 0
        assert timing.batch_seconds > 0
    assert timings == [(1, "cpu"), (8, "cpu")]


def test_a_whole_batch_is_timed_with_decoding_and_inference_without(text_worker: DryRun):
    watched = Watched(text_worker)
    assert devices.whole(text_worker, CASES["text"], 8, seconds=0.1) > 0
    assert len(watched["decode"]) == sum(watched["collate"])
    watched.clear()
    assert devices.inference(text_worker, CASES["text"], 8, seconds=0.1) > 0
    assert (len(watched["decode"]), set(watched["collate"])) == (1, {8})


def test_a_gpu_is_compared_with_the_cpu_at_the_same_batch_size():
    timings = [Timing("text", "cpu", "float32", 8, 0.004, 0.001), Timing("text", "0", "bfloat16", 8, 0.002, 0.0015)]
    assert rows(timings) == [
        ("text", "8", "cpu", "float32", "2,000", "1.00", "4.00", "25%"),
        ("text", "8", "GPU 0", "bfloat16", "4,000", "2.00", "2.00", "75%"),
    ]
    assert rows(timings[1:])[0][5] == ""


def test_the_report_is_written(tmp_path: Path):
    ended = run(app, "--devices", "cpu", "--cases", "text", "--seconds", "0.5", "--output", str(tmp_path / "gpu.md"))
    assert ended.status == 0, ended.stderr
    text = (tmp_path / "gpu.md").read_text()
    assert [line.count("|") for line in text.splitlines() if line.startswith("| text | 64 | cpu |")] == [9]


def test_what_was_measured_before_a_fault_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(*_: object) -> Iterator[Timing]:
        yield Timing("text", "cpu", "float32", 1, 0.002, 0.001)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(devices, "measure_case", measure)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(app, "--devices", "cpu", "--cases", "text", "--output", str(tmp_path / "gpu.md"))
    assert "| text | 1 | cpu | float32 | 500 |" in (tmp_path / "gpu.md").read_text()


def test_a_batch_that_takes_one_device_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "LONGEST", 0)
    assert [timing.batch for timing in measure_case(CASES["text"], ["cpu"], (1, 8), seconds=0.5)] == [1]


@pytest.mark.parametrize("place", ["notes.md", "", "notes.md/gpu.md"])
def test_another_file_is_left_as_it_is(place: str, tmp_path: Path):
    (tmp_path / "notes.md").write_text("# Mine\n")
    ended = run(app, "--devices", "cpu", "--output", str(tmp_path / place))
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert (tmp_path / "notes.md").read_text() == "# Mine\n"


def test_a_run_that_measured_nothing_hinders_no_other(tmp_path: Path):
    output = ["--devices", "cpu", "--seconds", "0.1", "--output", str(tmp_path / "gpu.md")]
    assert run(app, *output, "--cases", "nope").status == 2
    assert run(app, *output, "--cases", "text").status == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    ended = run(app)
    assert ended.status == 2
    assert "There is no GPU '0'" in ended.stderr
    assert "DEVICES=cpu" in ended.stderr


@pytest.mark.parametrize("asked", ["gpu", "-1", "99", ","])
def test_an_unknown_device_is_refused(asked: str):
    ended = run(app, "--devices", asked)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
