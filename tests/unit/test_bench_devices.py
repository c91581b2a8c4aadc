"""`make bench-gpu`, on the device that every machine has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loadtest.bench import devices
from loadtest.bench.cases import CASES
from loadtest.bench.devices import Timing, app, measure_case, rows
from tests.programs import run


def test_a_worker_is_timed_on_the_cpu():
    timings = list(measure_case(CASES["text"], ["cpu"], (1, 8), seconds=0.5))
    assert [(timing.batch, timing.device) for timing in timings] == [(1, "cpu"), (8, "cpu")]
    for timing in timings:
        assert 0 < timing.inference_seconds < timing.batch_seconds
    alone, together = timings
    assert together.rate > alone.rate  # else nothing was batched


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
