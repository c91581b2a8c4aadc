"""Measure the bundle and its peers on this machine, in one interleaved run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bundle import machine
from bundle.cli import console as terminal
from bundle.cli.console import console, note
from bundle.cli.parameters import comma_list
from bundle.errors import BundleError, UsageError
from bundle.files import around_section, write_section
from bundle.load.generator import wrk
from loadtest.bench import report
from loadtest.bench.cases import CASES
from loadtest.bench.paths import ROOT, WORK
from loadtest.bench.results import Results
from loadtest.bench.runner import Plan, Runner, allow_open_files

app = terminal.program()

OUTPUT = ROOT / "BENCHMARKS.md"
CHART = ROOT / "loadtest" / "bench" / "throughput.png"
RESULTS = WORK / "results.json"  # of the run that these two files show
PARTIAL = WORK / "partial.md"  # the report of a run that is interrupted, or measures a part only
WARM_UP = 30.0  # longest, in seconds; the JVM compiles TorchServe's frontend meanwhile
ROUNDS = 3  # the fewest of a published report
INTERRUPTED = 130  # exit status; run() changes it to 143 after SIGTERM


class Bar:
    """A progress bar of the planned seconds."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.task = bars.add_task("", total=None)

    def plan(self, seconds: float) -> None:
        note(
            f"This takes about {max(1, round(seconds / 60))} min. Ctrl-C stops it; what was measured is reported, and "
            "--resume (RESUME=1) continues it."
        )
        self.bars.update(self.task, total=seconds)

    def doing(self, what: str) -> None:
        self.bars.update(self.task, description=what)

    def done(self, seconds: float) -> None:
        self.bars.advance(self.task, seconds)

    def say(self, line: str) -> None:
        note(line)


def chosen(names: tuple[str, ...] | None, known: dict, what: str) -> list:
    """Return the entries with these names, in the order of the names; without names, all entries.

    Raises:
        UsageError: one of them is unknown.
    """
    wanted = names or known
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"There is no {what} {unknown[0]!r}; there are: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(wanted)]


def clients(text: str) -> int:
    """Parse a number of clients.

    Raises:
        ValueError: the text is not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


Cases = Annotated[
    tuple | None,
    typer.Option(parser=comma_list(str, "cases"), metavar="NAME,...", help=f"By default, all: {', '.join(CASES)}."),
]


@app.command(
    help=__doc__,
    epilog="Examples: `python -m loadtest.bench` · `python -m loadtest.bench --cases text --systems bundle,litserve"
    " --concurrency 16,64 --rounds 1 --seconds 3 --output build/bench/text.md`"
    " · `python -m loadtest.bench --report-only`",
)
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each system is started and measured.")] = ROUNDS,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each run of the load generator, in seconds.")] = 3,
    cases: Cases = None,
    systems: Annotated[
        tuple | None, typer.Option(parser=comma_list(str, "systems"), metavar="NAME,...", help="By default, all.")
    ] = None,
    concurrency: Annotated[
        tuple | None,
        typer.Option(
            "--concurrency",
            "-c",
            parser=comma_list(clients, "whole numbers above 0"),
            metavar="N,...",
            help="Numbers of clients: 1,16,64. By default, those of each case.",
        ),
    ] = None,
    warm_up: Annotated[
        float, typer.Option(min=0, help="Longest time of load before anything counts, in seconds.")
    ] = WARM_UP,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Markdown file whose marked section is written. By default BENCHMARKS.md if everything was measured"
            f" in at least {ROUNDS} rounds, else build/bench/partial.md.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run: measure only what its results do not have.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the last results again, without measuring.")
    ] = False,
) -> None:
    output = output and output.resolve()
    # fail before minutes of measuring if the document is invalid
    around_section(output or OUTPUT, report.SECTION, report.TITLE)
    if report_only:
        target, interrupted = output or OUTPUT, False
        results = Results.read(results_file(target))
    else:
        plan = chosen_plan(rounds, seconds, warm_up, cases, systems, concurrency)
        target = output or PARTIAL
        results = started(results_file(target), seconds, warm_up, resume)
        interrupted = measure(results, results_file(target), plan)
        if results.measurements and not (output or interrupted) and is_everything(plan):
            results_file(PARTIAL).replace(RESULTS)
            target = OUTPUT
    if results.measurements or not interrupted:
        show(results, target)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def chosen_plan(
    rounds: int,
    seconds: float,
    warm_up: float,
    cases: tuple[str, ...] | None,
    systems: tuple[str, ...] | None,
    concurrency: tuple[int, ...] | None,
) -> Plan:
    """Return the plan of a run.

    Raises:
        UsageError: a case or a system is unknown.
    """
    from loadtest.bench.systems import SYSTEMS  # not at the top: it imports torch, which --help does not need

    return Plan(
        cases=chosen(cases, CASES, "case"),
        systems=chosen(systems, SYSTEMS, "system"),
        rounds=rounds,
        seconds=seconds,
        warm_up=warm_up,
        concurrencies=tuple(sorted(set(concurrency))) if concurrency else None,
    )


def is_everything(plan: Plan) -> bool:
    """Return whether all cases are measured with all systems at all their numbers of clients, in enough rounds."""
    from loadtest.bench.systems import SYSTEMS

    everything = len(plan.cases) == len(CASES) and len(plan.systems) == len(SYSTEMS) and plan.concurrencies is None
    return everything and plan.rounds >= ROUNDS


def started(file: Path, seconds: float, warm_up: float, resume: bool) -> Results:
    """Return the results that a run adds to: those of the file if it is resumed, else empty ones.

    Raises:
        BundleError: there are no results to resume, or they are of another commit, machine or setting.
    """
    about = machine.about()
    if not resume:
        return Results(about, seconds, warm_up)
    results = Results.read(file)
    results.check_continues(about, seconds, warm_up)
    results.about["date"] += f", continued {about['date']}"
    return results


def results_file(output: Path) -> Path:
    """Return the file with the results of a report."""
    return RESULTS if output == OUTPUT else output.with_suffix(".json")


def measure(results: Results, file: Path, plan: Plan) -> bool:
    """Measure the plan.

    Returns:
        whether the run was interrupted, by Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        BundleError: the load generator is missing, or the limit of open files is too low.
    """
    wrk()
    allow_open_files()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with terminal.progress(*columns, TimeRemainingColumn()) as bars:
        try:
            Runner(plan, results, file, Bar(bars)).run()
        except KeyboardInterrupt:
            note("Interrupted. The report has what was measured until then.")
            return True
    return False


def show(results: Results, output: Path) -> None:
    """Print the tables, draw the chart and write the report.

    Raises:
        BundleError: the results hold no measurement.
    """
    if results.measurements:
        for table in report.terminal_tables(results):
            console.print(table)
        console.print(report.disturbance(results))
    for failure in results.failures:
        console.print(report.failure_text(failure), markup=False, soft_wrap=True)
    if not results.measurements:
        raise BundleError("Nothing was measured, so no report was written.")
    chart = CHART if output == OUTPUT else output.with_suffix(".png")
    drawn = draw(results, chart)
    text = report.markdown(results, report.relative_to(chart, output.parent) if drawn else None)
    write_section(output, report.SECTION, text, report.TITLE)
    console.print(f"Written: {output}" + (f", {chart}" if drawn else ""), soft_wrap=True)


def draw(results: Results, chart: Path) -> bool:
    try:
        from loadtest.bench.chart import draw as draw_chart
    except ImportError:
        note("No chart: matplotlib is missing. Install it: pip install -r requirements/loadtest.txt")
        return False
    draw_chart(results, chart)
    return True


if __name__ == "__main__":
    terminal.run(app, "python -m loadtest.bench")
