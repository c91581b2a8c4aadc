"""The commands that measure: find a model's fastest settings, show where a request's time goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from bundle.cli.console import console, errors, note, progress
from bundle.cli.parameters import Folder, Inputs, Model, Target, choice, comma_list
from bundle.errors import NotRunning

if TYPE_CHECKING:  # torch comes with them
    from bundle.tuning.search import Score
    from bundle.tuning.session import Session

app = typer.Typer()
BUSY = 25  # % of the CPU that other processes take: measurements suffer


def precision(text: str) -> str:
    """Parse the name of a precision."""
    from bundle.tuning.tuner import PRECISIONS  # imports torch, which takes seconds

    return choice(*PRECISIONS)(text)


@app.command(
    epilog="Examples: `bundle tune image --p99 100ms` · `bundle tune text --p99 0.02s --minutes 15 --patch text.patch`"
    " · `bundle tune image --p99 50ms --precision float32,bfloat16 --input a.jpg --input b.jpg`"
)
def tune(
    model: Folder,
    p99: Target,
    minutes: Annotated[float, typer.Option("--minutes", "-m", min=0.5, help="About how long to search.")] = 5,
    patch: Annotated[
        Path | None,
        typer.Option(help="Write a diff to this file, and the evidence beside it; change nothing in models/."),
    ] = None,
    inputs: Inputs = None,
    precisions: Annotated[
        tuple | None,
        typer.Option(
            "--precision", parser=comma_list(precision, "precisions"), metavar="NAME,...",
            help="Precisions to try, with commas: auto, float32, bfloat16, float16, int8.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Find a model's fastest settings that keep a latency target.

    The settings are workers, threads, batch size, precision and, where batches wait to fill, the delay. The best ones,
    with which the model answers most requests a second while its p99 latency stays within the target, are written to
    its model-config.yaml.

    Candidates are measured under load, on a TorchServe of their own. The better half goes on to a longer round, until
    the last ones are compared in turns with the current settings, which stay unless others are 5 % better. Leave the
    machine alone meanwhile: other load disturbs the measurements.
    """
    from bundle.build.archive import archive
    from bundle.catalog import select
    from bundle.load.generator import wrk
    from bundle.server.process import Server
    from bundle.tuning.session import Session
    from bundle.tuning.tuner import read_inputs

    wrk()
    [folder] = select([model])
    sent = read_inputs(folder, inputs or [])
    with errors.status(f"archive {folder.name}"):
        built = archive(folder, Server().store).path
    warn_if_busy()
    tune_session(Session(folder, built, p99, 60 * minutes, sent, list(dict.fromkeys(precisions or ())), patch))


def warn_if_busy() -> None:
    """Say what will disturb the measurements."""
    from bundle.server.process import Server

    running = Server().running()
    if running:
        note(f"Note: TorchServe (PID {running.pid}) is running, too. Requests to it disturb the measurements.")
    if busy := load_of_others():
        note(f"Note: {busy}, which makes the measurements less reliable.")


def load_of_others() -> str:
    """Return how much other processes use of the cores that this one can use, in words; "" if it is little."""
    import os

    import psutil

    cores = psutil.cpu_percent(interval=1, percpu=True)
    usable = os.sched_getaffinity(0)
    busy = sum(cores[number] for number in usable) / len(usable)
    return f"other processes use {busy:.0f} % of the CPU" if busy > BUSY else ""


def tune_session(session: "Session") -> None:
    """Search with a progress bar, print what was found, and write it down.

    Raises:
        BundleError: nothing can be measured, or nothing reaches the target; then nothing is written.
        KeyboardInterrupt: likewise.
    """
    from bundle.tuning import report

    try:
        with time_left(session.budget) as show:
            found = session.run(show)
    except KeyboardInterrupt:
        best = session.best
        note("Stopped; nothing is written." + (f" Best so far: {best[1]}" if best else ""))
        if best:
            note(f"  {report.describe(best[0])}")
        raise
    console.print(found.table())
    for line in found.lines():
        console.print(line, markup=False, soft_wrap=True)
    for line in session.write_down(found):
        console.print(line, markup=False, soft_wrap=True)


class TimeLeft(ProgressColumn):
    """The time until a task's field `deadline`."""

    def render(self, task: Task) -> Text:
        """Return minutes and seconds."""
        left = max(0, round(task.fields["deadline"] - time.monotonic()))
        return Text(f"{left // 60}:{left % 60:02} left" if left else "soon done")


@contextmanager
def time_left(budget: float) -> Iterator[Callable[[str, "Score | None"], None]]:
    """Show a bar over the budget (seconds); yield what updates it: the current step, and the best score so far."""
    columns = (SpinnerColumn(), BarColumn(bar_width=12), TimeLeft(), TextColumn("{task.description}", markup=False))
    start = time.monotonic()
    with progress(*columns) as bars:
        task = bars.add_task("starts TorchServe", total=budget, deadline=start + budget)

        def show(doing: str, best: "Score | None") -> None:
            described = f"{doing}, best {best.throughput:.0f}/s" if best else doing
            bars.update(task, completed=min(budget, time.monotonic() - start), description=described)

        yield show


@app.command(epilog="Examples: `bundle profile mnist` · `bundle profile image --concurrency 16 --seconds 20`")
def profile(
    model: Model,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Clients at the same time.")] = 64,
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=1, help="How long to load the model.")] = 10,
) -> None:
    """Show where a request's time goes.

    It prints the time of each stage and the processor time, and draws a flame graph of a worker (py-spy).
    """
    from bundle.catalog import select
    from bundle.load.profile import profile as watch
    from bundle.paths import relative
    from bundle.server.process import Server

    [folder] = select([model])
    server = Server()
    running = server.running()
    if running is None:
        raise NotRunning("TorchServe is not running. Start it: make serve")
    with errors.status(f"{concurrency} clients ask {model} for {seconds:g} seconds"):
        seen = watch(running, server.settings, folder, concurrency, seconds)
    console.print(seen.table())
    console.print(f"{seen.load.throughput:.0f} requests/s with {concurrency} clients, {seen.load.failed} failed")
    console.print(f"Flame graph of a worker: {relative(seen.graph)}", markup=False)
