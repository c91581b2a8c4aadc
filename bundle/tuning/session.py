"""Run one search for a model's settings: check, search, write the evidence and the new settings."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.paths import relative
from bundle.server.process import Server
from bundle.tuning import report, tuner, yaml_edit
from bundle.tuning.search import Point, Score, Verdict, summary
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Input, TrialServer, settings_of
from bundle.tuning.tuner import Tuning


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        points: one for each candidate and concurrency.
    """

    tuning: Tuning
    verdict: Verdict
    points: list[Point]

    def table(self) -> Table:
        """Return the Pareto front."""
        return report.table(self.points, self.tuning.current, self.verdict.best, self.tuning.target)

    def lines(self) -> Iterator[str]:
        """Yield lines about the best and the current settings, the candidates that failed, and the decision."""
        for candidate, score in self.verdict.scores.items():
            name = {self.verdict.best: "best:", self.tuning.current: "now: "}.get(candidate)
            if name:
                yield f"{name} {candidate}: {report.describe(score)}"
                if candidate in self.tuning.steady:
                    yield f"      {report.describe_steady(self.tuning.steady[candidate].load)}"
        yield from self.tuning.left_out()
        yield self.verdict.reason


class Session:
    """One search.

    Args:
        archive: the model's archive.
        target: of the p99 latency, in seconds.
        budget: how long to search, in seconds.
        inputs: what to send; several take turns.
        precisions: the precisions to try; by default, the current one.
        patch: the file for a diff, which is written instead of the folder's new settings.
        run_dir: the run folder of the server that is measured; by default, a folder in that of `make serve`.

    Raises:
        BundleError: matplotlib or the patch's folder is missing, or the archive cannot be served in one of the
            precisions.
    """

    def __init__(
        self,
        folder: ModelFolder,
        archive: Path,
        target: float,
        budget: float,
        inputs: list[Input],
        precisions: list[str] | None = None,
        patch: Path | None = None,
        run_dir: Path | None = None,
    ):
        self.folder, self.archive, self.target, self.budget = folder, archive, target, budget
        self.inputs, self.patch, self.run_dir = inputs, patch, run_dir or Server().run_dir / "tune"
        self.draw = drawing()
        if patch and not patch.absolute().parent.is_dir():
            raise BundleError(
                f"The patch's folder {patch.absolute().parent} does not exist. Make it, or name another file."
            )
        self.current = tuner.current_settings(folder)
        self.precisions = precisions or [self.current.precision]
        tuner.check_precisions(self.precisions, self.current.precision, folder, archive)
        self.tuning: Tuning | None = None

    @property
    def best(self) -> tuple[Score, Candidate] | None:
        """The best settings so far."""
        return self.tuning.best if self.tuning else None

    def run(self, show: Callable[[str, Score | None], None]) -> Found:
        """Measure candidates on a server of their own.

        Args:
            show: receives the current step, and the best score so far.

        Raises:
            BundleError: the current settings cannot be served, or no candidate meets the target.
        """
        with tempfile.TemporaryDirectory(prefix="tune-") as store:
            trial_server = TrialServer(self.folder, self.archive, self.inputs, self.run_dir, Path(store))
            with trial_server.server.lock(), trial_server:
                waits = tuner.waits_to_fill(self.folder)
                self.tuning = Tuning(trial_server, self.current, self.precisions, waits, self.target, self.budget, show)
                verdict = self.tuning.run()
        return Found(self.tuning, verdict, summary(self.tuning.points))

    def write_down(self, found: Found) -> list[str]:
        """Write the evidence, and the new settings or a patch; return lines that say where.

        Raises:
            BundleError: model-config.yaml cannot be edited; the message has the changes to make by hand.
        """
        tuning, verdict = found.tuning, found.verdict
        evidence = {
            "model": self.folder.name,
            "target_p99_ms": 1000 * self.target,
            "budget_minutes": self.budget / 60,
            "inputs": report.sent(self.inputs),
            "archive": report.content(self.archive),
            "machine": report.machine(tuner.cores()),
            **report.outcome(self.current, verdict, tuning.steady),
            **report.measured(tuning.points, tuning.broken, tuning.precisions),
        }
        title = f"{self.folder.name}: p99 within {1000 * self.target:g} ms"
        picture = self.draw(title, found.points, self.current, verdict.best, self.target, ("svg",))["svg"]
        wanted = changes(self.folder, self.current, verdict.best) if verdict.replaces else {}
        return write_down(self.folder, evidence, picture, wanted, self.patch)


def drawing() -> Callable:
    """Return the function that draws the chart.

    It is imported before the search, so that a missing library does not show only after minutes of measuring.

    Raises:
        BundleError: matplotlib is missing.
    """
    try:
        from bundle.tuning.chart import draw
    except ModuleNotFoundError as error:
        raise BundleError(
            f"{error.name} is missing. Install it: .venv/bin/python -m pip install -r requirements/loadtest.txt"
        ) from error
    return draw


def changes(folder: ModelFolder, current: Candidate, best: Candidate) -> dict:
    """Return what to change in model-config.yaml.

    `maxWorkers` is only raised, and only if it is too low: it is the user's limit for scaling.
    """
    now = settings_of(current)
    wanted = {keys: value for keys, value in settings_of(best).items() if value != now[keys]}
    most = int(folder.config.get("maxWorkers") or 1)
    limit = ("maxWorkers",)
    wanted.pop(limit, None)
    return wanted | {limit: best.workers} if best.workers > most else wanted


def write_down(folder: ModelFolder, found: dict, picture: bytes, wanted: dict, patch: Path | None) -> list[str]:
    """Write the evidence, and the new settings or a patch; return lines that say where.

    Args:
        found: the evidence.
        picture: the chart, SVG.
        wanted: the changes of model-config.yaml.
        patch: the file for a diff, which is written instead of the new settings.

    Raises:
        BundleError: the file cannot be edited; the message has the changes to make by hand.
    """
    beside = patch.parent / patch.stem if patch else folder.path / "tuning"
    for ending, content in ((".json", json.dumps(found, indent=1) + "\n"), (".svg", picture)):
        write_atomically(beside.with_name(beside.name + ending), content)
    lines = [f"Evidence: {relative(beside)}.json, {relative(beside)}.svg"]
    file = folder.path / CONFIG_NAME
    old = file.read_text()
    new = yaml_edit.edited(old, wanted)
    if old == new:
        return [*lines, f"{relative(file)} is unchanged."]
    if patch:
        write_atomically(patch, yaml_edit.difference(old, new, relative(file)))
        return [*lines, f"Patch: {patch}. Apply it: git apply {patch}"]
    write_atomically(file, new)
    return [*lines, f"{relative(file)} is changed. Serve it: make serve"]
