"""`python -m bundle tune`."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from bundle.catalog import CONFIG_NAME, ModelFolder, select
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.load.generator import wrk
from bundle.paths import relative
from bundle.server.process import Server

if TYPE_CHECKING:  # torch comes with them: seconds that `--help` need not wait
    from bundle.tuning.search import Point, Score, Verdict
    from bundle.tuning.space import Candidate
    from bundle.tuning.trial_server import Input
    from bundle.tuning.tuner import Tuning

BUSY = 25  # % of the CPU that others take: measurements suffer
EXAMPLES = (
    "Examples: `python -m bundle tune image --p99 100ms` · `python -m bundle tune text --p99 0.02s --minutes 15 "
    "--patch text.patch` · `python -m bundle tune image --p99 50ms --precision float32,bfloat16 --input a.jpg --input "
    "b.jpg`"
)
console = Console(highlight=False)


def tune(
    model: Annotated[str, typer.Argument(help="A folder in models/.")],
    p99: Annotated[str, typer.Option(help="What 99 % of the answers must stay within: 100ms, 0.1s.")],
    minutes: Annotated[float, typer.Option(min=0.5, help="About how long to search.")] = 5,
    patch: Annotated[
        Path | None, typer.Option(help="Write a diff here, and the evidence beside it; change nothing in models/.")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="What to send; several take turns. By default, the model's sample."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Which to try, with commas: auto, float32, bfloat16, float16, int8.")
    ] = None,
) -> None:
    """Find the workers, threads, batch size and delay with which a model answers most requests a second while its p99
    latency stays within a target, and write them to its model-config.yaml.

    Measures candidates under load, on a TorchServe of its own. The better half goes on to a longer round, until the
    last ones are compared in turns with the settings that there are. Those stay unless others are 5 % better.
    Leave the machine alone meanwhile: what else runs is measured, too.
    """
    from bundle.tuning.tuner import parse_duration, parse_precisions, read_inputs

    target = parse_duration(p99)
    wrk()
    [folder] = select([model])
    precisions, sent = parse_precisions(precision), read_inputs(folder, inputs or [])
    archive = built(folder)
    warn_if_busy()
    tune_folder(folder, archive, target, 60 * minutes, sent, precisions, patch)


def built(folder: ModelFolder) -> Path:
    """The folder's archive, up to date."""
    from bundle.build.archive import archive

    with console.status(f"archive {folder.name}"):
        return archive(folder, Server().store).path


def warn_if_busy() -> None:
    running = Server().running()
    if running:
        console.print(f"Note: TorchServe (PID {running.pid}) runs, too. Requests to it disturb the measurements.")
    busy = psutil.cpu_percent(interval=1)
    if busy > BUSY:
        console.print(f"Note: other processes take {busy:.0f} % of the CPU. Measurements will be worse for it.")


def tune_folder(
    folder: ModelFolder,
    archive: Path,
    target: float,
    budget: float,
    inputs: list["Input"],
    precisions: list[str] | None = None,
    patch: Path | None = None,
    run_dir: Path | None = None,
) -> None:
    """The command, without its arguments' text.

    Args:
        target: seconds.
        budget: seconds.
        precisions: which to try; by default, what the folder says.

    Raises:
        BundleError: nothing can be measured, or nothing reaches the target; then nothing is written.
        typer.Exit: Ctrl-C; likewise.
    """
    from bundle.tuning import report
    from bundle.tuning import tuner as tune
    from bundle.tuning.search import summary
    from bundle.tuning.trial_server import Bench

    draw = drawing()
    if patch and not patch.absolute().parent.is_dir():
        raise BundleError(f"There is no folder {patch.absolute().parent} for the patch.")
    current = tune.current_settings(folder)
    precisions = precisions or [current.precision]
    tune.check_precisions(precisions, current.precision, folder, archive)
    tuning = None
    with tempfile.TemporaryDirectory(prefix="tune-") as store:
        bench = Bench(folder, archive, inputs, run_dir or Server().run_dir / "tune", Path(store))
        try:
            with bench.server.lock(), progress(budget) as show, bench:
                tuning = tune.Tuning(bench, current, precisions, target, budget, show)
                verdict = tuning.run()
        except KeyboardInterrupt:
            best = tuning and tuning.best
            console.print("\nStopped; nothing is written." + (f" Best so far: {best[1]}" if best else ""))
            if best:
                console.print(f"  {report.describe(best[0])}")
            raise typer.Exit(130) from None
    points = summary(tuning.points)
    tell(points, tuning, verdict)
    found = {
        "model": folder.name,
        "target_p99_ms": 1000 * target,
        "budget_minutes": budget / 60,
        "inputs": [{"file": each.file.name, "bytes": len(each.body)} for each in inputs],
        "machine": report.machine(tune.cores()),
        **report.outcome(current, verdict, tuning.steady),
        **report.measured(tuning.points, tuning.broken, tuning.precisions),
    }
    title = f"{folder.name}: p99 within {1000 * target:g} ms"
    picture = draw(title, points, current, verdict.best, target, ("svg",))["svg"]
    write_down(folder, found, picture, changes(folder, current, verdict.best) if verdict.replaces else {}, patch)


def tell(points: list["Point"], tuning: "Tuning", verdict: "Verdict") -> None:
    """What was found, for people."""
    from bundle.tuning import report

    console.print(report.table(points, tuning.current, verdict.best, tuning.target))
    for candidate, score in verdict.scores.items():
        name = {verdict.best: "best:", tuning.current: "now: "}.get(candidate)
        if name:
            console.print(f"{name} {candidate}: {report.describe(score)}", soft_wrap=True)
            if candidate in tuning.steady:
                console.print(f"      {report.describe_steady(tuning.steady[candidate])}", soft_wrap=True)
    for candidate, why in tuning.broken.items():
        console.print(f"not servable: {candidate}: {why}", style="yellow", markup=False, soft_wrap=True)
    console.print(verdict.reason)


def drawing() -> Callable:
    """Now rather than after minutes of measuring: is there what draws?"""
    try:
        from bundle.tuning.chart import draw
    except ModuleNotFoundError as error:
        raise BundleError(
            f"{error.name} is missing. Install it: .venv/bin/python -m pip install -r requirements/loadtest.txt"
        ) from error
    return draw


def changes(folder: ModelFolder, current: "Candidate", best: "Candidate") -> dict:
    """What to change in model-config.yaml. `maxWorkers` is a limit, which the management API may scale up to: it is
    raised where it must be."""
    from bundle.tuning.trial_server import settings_of

    now = settings_of(current)
    wanted = {keys: value for keys, value in settings_of(best).items() if value != now[keys]}
    most = int(folder.config.get("maxWorkers") or 1)
    limit = ("maxWorkers",)
    wanted.pop(limit, None)
    return wanted | {limit: best.workers} if best.workers > most else wanted


def write_down(folder: ModelFolder, found: dict, picture: bytes, wanted: dict, patch: Path | None) -> None:
    """The evidence, and the new settings or a patch.

    Raises:
        BundleError: the file cannot be edited; with what to write there by hand.
    """
    from bundle.tuning import yaml_edit as config_file

    beside = patch.parent / patch.stem if patch else folder.path / "tuning"
    for ending, content in ((".json", json.dumps(found, indent=1) + "\n"), (".svg", picture)):
        write_atomically(beside.with_name(beside.name + ending), content)
    console.print(f"Evidence: {relative(beside)}.json, {relative(beside)}.svg", soft_wrap=True)
    file = folder.path / CONFIG_NAME
    old = file.read_text()
    new = config_file.edited(old, wanted)
    if old == new:
        console.print(f"{relative(file)} stays as it is.")
    elif patch:
        write_atomically(patch, config_file.difference(old, new, relative(file)))
        console.print(f"Patch: {patch}. Apply it: git apply {patch}", soft_wrap=True)
    else:
        write_atomically(file, new)
        console.print(f"{relative(file)} is changed. Serve it: make serve")


class TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = max(0, round(task.fields["deadline"] - time.monotonic()))
        return Text(f"{left // 60}:{left % 60:02} left" if left else "soon done")


@contextmanager
def progress(budget: float) -> Iterator[Callable]:
    """A bar over the budget, and what it is told."""
    columns = (SpinnerColumn(), BarColumn(bar_width=12), TimeLeft(), TextColumn("{task.description}", markup=False))
    start = time.monotonic()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("starts TorchServe", total=budget, deadline=start + budget)

        def show(doing: str, best: "Score | None") -> None:
            described = f"{doing}, best {best.throughput:.0f}/s" if best else doing
            bars.update(task, completed=min(budget, time.monotonic() - start), description=described)

        yield show
