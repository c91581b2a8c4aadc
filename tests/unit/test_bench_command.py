"""The files that a run of the benchmark writes."""

from pathlib import Path

import pytest

from bundle.load.generator import LoadResult
from loadtest.bench import __main__ as command
from loadtest.bench.results import Measurement, Results
from tests import programs

BEFORE = "# Benchmarks\n\n<!-- bench:start -->\nthe last full run\n<!-- bench:end -->\n"
LOAD = LoadResult(1, 900, 0, 900, 0.01, 0.015, 0.02, 0.05)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the results of a full run, and replace the measurement by one invented load."""
    places = {"OUTPUT": "BENCHMARKS.md", "CHART": "throughput.png", "RESULTS": "results.json", "PARTIAL": "partial.md"}
    for name, file in places.items():
        monkeypatch.setattr(command, name, tmp_path / file)
    (tmp_path / "BENCHMARKS.md").write_text(BEFORE)
    (tmp_path / "results.json").write_text("{}")
    measuring(monkeypatch)
    return tmp_path


def measuring(monkeypatch: pytest.MonkeyPatch, interrupted: bool = False) -> None:
    def measure(results: Results, file: Path, _: object) -> bool:
        results.versions["bundle"] = "1"
        results.measurements.append(Measurement("text", "bundle", 1, 16, None, None, LOAD, 1.0, 0.0, 500_000_000))
        results.save(file)
        return interrupted

    monkeypatch.setattr(command, "measure", measure)


def run(*arguments: str) -> int:
    return programs.run(command.app, *arguments).status


def is_untouched(project: Path) -> bool:
    texts = ((project / file).read_text() for file in ("BENCHMARKS.md", "results.json"))
    return [*texts] == [BEFORE, "{}"] and not (project / "throughput.png").exists()


def test_full_run_updates_benchmarks_md(project: Path):
    assert run() == 0
    text = (project / "BENCHMARKS.md").read_text()
    assert "the last full run" not in text
    assert "| **bundle** | **16** | **900** |" in text
    assert [one.load for one in Results.read(project / "results.json").measurements] == [LOAD]
    assert run("--report-only") == 0
    assert (project / "BENCHMARKS.md").read_text() == text


PARTS = [("--cases", "text"), ("--systems", "bundle"), ("--concurrency", "16"), ("--rounds", "2")]


@pytest.mark.parametrize("part", PARTS)
def test_partial_run_writes_partial_report(project: Path, part: tuple[str, str]):
    assert run(*part) == 0
    assert is_untouched(project)
    assert "**900**" in (project / "partial.md").read_text()


def test_interrupted_run_writes_partial_report(project: Path, monkeypatch: pytest.MonkeyPatch):
    measuring(monkeypatch, interrupted=True)
    assert run() == 130
    assert is_untouched(project)
    assert "**900**" in (project / "partial.md").read_text()


def test_resumed_run_adds_to_the_results_of_the_interrupted_one(project: Path, monkeypatch: pytest.MonkeyPatch):
    measuring(monkeypatch, interrupted=True)
    assert run() == 130
    measuring(monkeypatch)
    assert run("--resume") == 0
    results = Results.read(project / "results.json")
    assert len(results.measurements) == 2
    assert ", continued 20" in results.about["date"]
    assert "the last full run" not in (project / "BENCHMARKS.md").read_text()


@pytest.mark.parametrize(
    ("options", "commit", "reason"),
    [
        ((), None, "there are no results yet"),
        (("--seconds", "1"), "a", "another seconds: 3, now 1"),
        ((), "b", "a, now b"),
    ],
)
def test_run_with_other_conditions_cannot_be_resumed(
    project: Path, monkeypatch: pytest.MonkeyPatch, options: tuple, commit: str | None, reason: str
):
    if commit:
        monkeypatch.setattr("bundle.machine.commit", lambda: "a")
        measuring(monkeypatch, interrupted=True)
        run()
        monkeypatch.setattr("bundle.machine.commit", lambda: commit)
    result = programs.run(command.app, "--resume", *options)
    assert result.status == 1
    assert reason in " ".join(result.stderr.split())
    assert is_untouched(project)


def test_run_with_an_output_file_writes_only_that_file(project: Path):
    assert run("--cases", "text", "--output", str(project / "mine.md")) == 0
    assert is_untouched(project)
    assert "**900**" in (project / "mine.md").read_text()
    assert (project / "mine.json").is_file()
