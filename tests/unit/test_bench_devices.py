"""`make bench-gpu`, on the CPU, which every machine has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loadtest.bench import devices
from loadtest.bench.cases import CASES
from loadtest.bench.devices import Timing, app, measure_case, rows
from tests.programs import run


@pytest.mark.slow
def test_measure_case_on_the_cpu_times_each_batch_size():
    timings = list(measure_case(CASES["text"], ["cpu"], (1, 8), seconds=0.5))
    assert [(timing.batch, timing.device) for timing in timings] == [(1, "cpu"), (8, "cpu")]
    for timing in timings:
        assert 0 < timing.inference_seconds < timing.batch_seconds
    alone, together = timings
    assert together.rate > alone.rate  # otherwise nothing was batched


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
    assert "There is no GPU '0' here" in ended.stderr
    assert "DEVICES=cpu" in ended.stderr


@pytest.mark.parametrize("asked", ["gpu", "-1", "99", ","])
def test_run_with_an_invalid_device_is_rejected(asked: str):
    ended = run(app, "--devices", asked)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
