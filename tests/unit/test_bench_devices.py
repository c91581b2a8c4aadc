"""`make bench-gpu`, on the CPU, which every machine has."""

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


@pytest.mark.slow
def test_measure_case_on_the_cpu_times_whole_batches_of_each_size(monkeypatch: pytest.MonkeyPatch):
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


@pytest.mark.slow
def test_whole_batch_is_timed_with_decoding_and_inference_without(text_worker: DryRun):
    watched = Watched(text_worker)
    assert devices.whole(text_worker, CASES["text"], 8, seconds=0.1) > 0
    assert len(watched["decode"]) == sum(watched["collate"])
    watched.clear()
    assert devices.inference(text_worker, CASES["text"], 8, seconds=0.1) > 0
    assert (len(watched["decode"]), set(watched["collate"])) == (1, {8})


def test_rows_compare_a_gpu_with_the_cpu_at_the_same_batch_size():
    timings = [Timing("text", "cpu", "float32", 8, 0.004, 0.001), Timing("text", "0", "bfloat16", 8, 0.002, 0.0015)]
    assert rows(timings) == [
        ("text", "8", "cpu", "float32", "2,000", "1.00", "4.00", "25%"),
        ("text", "8", "GPU 0", "bfloat16", "4,000", "2.00", "2.00", "75%"),
    ]
    assert rows(timings[1:])[0][5] == ""


@pytest.mark.slow
def test_run_writes_the_report(tmp_path: Path):
    ended = run(app, "--devices", "cpu", "--cases", "text", "--seconds", "0.5", "--output", str(tmp_path / "gpu.md"))
    assert ended.status == 0, ended.stderr
    text = (tmp_path / "gpu.md").read_text()
    assert [line.count("|") for line in text.splitlines() if line.startswith("| text | 64 | cpu |")] == [9]


def test_failed_run_reports_what_it_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(*_: object) -> Iterator[Timing]:
        yield Timing("text", "cpu", "float32", 1, 0.002, 0.001)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(devices, "measure_case", measure)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(app, "--devices", "cpu", "--cases", "text", "--output", str(tmp_path / "gpu.md"))
    assert "| text | 1 | cpu | float32 | 500 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_measure_case_skips_larger_batches_after_one_that_takes_too_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "LONGEST", 0)
    assert [timing.batch for timing in measure_case(CASES["text"], ["cpu"], (1, 8), seconds=0.5)] == [1]


@pytest.mark.parametrize("place", ["notes.md", "", "notes.md/gpu.md"])
def test_run_with_a_file_that_is_not_a_report_does_not_overwrite_it(place: str, tmp_path: Path):
    (tmp_path / "notes.md").write_text("# Mine\n")
    ended = run(app, "--devices", "cpu", "--output", str(tmp_path / place))
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert (tmp_path / "notes.md").read_text() == "# Mine\n"


@pytest.mark.slow
def test_run_after_one_that_measured_nothing_succeeds(tmp_path: Path):
    output = ["--devices", "cpu", "--seconds", "0.1", "--output", str(tmp_path / "gpu.md")]
    assert run(app, *output, "--cases", "nope").status == 2
    assert run(app, *output, "--cases", "text").status == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_without_a_gpu_names_the_alternative():
    ended = run(app)
    assert ended.status == 2
    assert "There is no GPU '0'" in ended.stderr
    assert "DEVICES=cpu" in ended.stderr


@pytest.mark.parametrize("asked", ["gpu", "-1", "99", ","])
def test_run_with_an_invalid_device_is_rejected(asked: str):
    ended = run(app, "--devices", asked)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
