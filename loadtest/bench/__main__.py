"""Measures the bundle side by side with its peers, on this machine, in one interleaved run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bundle import machine
from bundle.errors import BundleError
from bundle.files import around_section, write_section
from bundle.load.generator import wrk
from loadtest.bench import report
from loadtest.bench.cases import CASES
from loadtest.bench.paths import ROOT, WORK
from loadtest.bench.results import Results
from loadtest.bench.runner import Plan, Runner, allow_open_files
from loadtest.bench.systems.processes import interrupt_on_signals

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

OUTPUT = ROOT / "BENCHMARKS.md"
CHART = ROOT / "loadtest" / "bench" / "throughput.png"
RESULTS = WORK / "results.json"  # behind these two
PARTIAL = WORK / "partial.md"  # of a run that measures less than everything, or is ended early
WARM_UP = 10.0  # seconds: TorchServe's frontend, stock or the bundle's, is compiled while it runs
INTERRUPTED = 130


class Bar:
    """The runner's progress as a bar that moves with the planned seconds."""

    def __init__(self, bars: RichProgress):
        self.bars = bars
        self.task = bars.add_task("", total=None)

    def plan(self, seconds: float) -> None:
        self.bars.console.print(
            f"This takes about {max(1, round(seconds / 60))} min. Ctrl-C ends it with a report of what there is."
        )
        self.bars.update(self.task, total=seconds)

    def doing(self, what: str) -> None:
        self.bars.update(self.task, description=what)

    def done(self, seconds: float) -> None:
        self.bars.advance(self.task, seconds)

    def say(self, line: str) -> None:
        self.bars.console.print(line, markup=False, soft_wrap=True)


def words(text: str) -> list[str]:
    """What commas or spaces separate."""
    return text.replace(",", " ").split()


def chosen(names: str, known: dict, what: str) -> list:
    """The entries of these names, in their order; of no names, all.

    Raises:
        BundleError: one of them is unknown.
    """
    asked = words(names) or list(known)
    if unknown := [name for name in asked if name not in known]:
        raise BundleError(f"There is no {what} {unknown[0]!r}; there are: {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(asked)]


def numbers(text: str) -> tuple[int, ...] | None:
    """
    Raises:
        BundleError: not all of them are whole numbers of at least 1.
    """
    asked = words(text)
    if any(not word.isdecimal() or int(word) < 1 for word in asked):
        raise BundleError(f"--concurrency takes numbers of clients, as in 1,16,64; not {text!r}.")
    return tuple(sorted({int(word) for word in asked})) or None


@app.command(
    help=__doc__,
    epilog="Examples: `python -m loadtest.bench` · `python -m loadtest.bench --cases text --systems bundle,litserve"
    " --concurrency 16,64 --rounds 1 --seconds 3 --output build/bench/text.md`"
    " · `python -m loadtest.bench --report-only`",
)
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each system is started and measured.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each run of the load generator.")] = 3,
    cases: Annotated[str, typer.Option(help=f"Which, separated by commas: {', '.join(CASES)}; by default all.")] = "",
    systems: Annotated[str, typer.Option(help="Which, separated by commas; by default all.")] = "",
    concurrency: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "",
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before anything counts.")] = WARM_UP,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The Markdown file whose marked part is written; by default BENCHMARKS.md once everything is measured,"
            " build/bench/partial.md otherwise.",
            show_default=False,
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report the results of the last run again.")
    ] = False,
) -> None:
    output = output and output.resolve()
    try:
        # an invalid document must be reported before minutes of measuring
        around_section(output or OUTPUT, report.SECTION, report.TITLE)
        if report_only:
            target, interrupted = output or OUTPUT, False
            results = Results.read(results_file(target))
        else:
            plan = chosen_plan(rounds, seconds, warm_up, cases, systems, concurrency)
            target = output or PARTIAL
            results = Results(machine.about(), seconds, warm_up)
            interrupted = measure(results, results_file(target), plan)
            if results.measurements and not (output or interrupted) and is_everything(plan):
                results_file(PARTIAL).replace(RESULTS)
                target = OUTPUT
        if results.measurements or not interrupted:
            show(results, target)
    except BundleError as exc:
        errors.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        if exc.details:
            errors.print(exc.details, markup=False, soft_wrap=True)
        raise typer.Exit(1) from exc
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def chosen_plan(rounds: int, seconds: float, warm_up: float, cases: str, systems: str, concurrency: str) -> Plan:
    """
    Raises:
        BundleError: a case or a system is unknown, or the concurrency is not numbers.
    """
    from loadtest.bench.systems import SYSTEMS  # imports torch: seconds that --help need not wait

    return Plan(
        cases=chosen(cases, CASES, "case"),
        systems=chosen(systems, SYSTEMS, "system"),
        rounds=rounds,
        seconds=seconds,
        warm_up=warm_up,
        concurrencies=numbers(concurrency),
    )


def is_everything(plan: Plan) -> bool:
    """Whether all cases are measured with all systems at all their numbers of clients."""
    from loadtest.bench.systems import SYSTEMS

    return len(plan.cases) == len(CASES) and len(plan.systems) == len(SYSTEMS) and plan.concurrencies is None


def results_file(output: Path) -> Path:
    """The results behind a report."""
    return RESULTS if output == OUTPUT else output.with_suffix(".json")


def measure(results: Results, file: Path, plan: Plan) -> bool:
    """Measures the plan; returns whether it was ended early: by Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        BundleError: the load generator is missing, or may not open as many files as it needs.
    """
    wrk()
    allow_open_files()
    interrupt_on_signals()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, TimeRemainingColumn(), console=console) as bars:
        try:
            Runner(plan, results, file, Bar(bars)).run()
        except KeyboardInterrupt:
            bars.console.print("Interrupted: this is what was measured until then.")
            return True
    return False


def show(results: Results, output: Path) -> None:
    """Prints the tables, draws the chart, writes the file.

    Raises:
        BundleError: there is nothing to show.
    """
    if results.measurements:
        for table in report.terminal_tables(results):
            console.print(table)
        console.print(report.disturbance(results))
    for failure in results.failures:
        console.print(report.failure_text(failure), markup=False, soft_wrap=True)
    if not results.measurements:
        raise BundleError("Nothing was measured, so nothing is written.")
    chart = CHART if output == OUTPUT else output.with_suffix(".png")
    drawn = draw(results, chart)
    text = report.markdown(results, report.relative_to(chart, output.parent) if drawn else None)
    write_section(output, report.SECTION, text, report.TITLE)
    console.print(f"Written: {output}" + (f", {chart}" if drawn else ""), soft_wrap=True)


def draw(results: Results, chart: Path) -> bool:
    try:
        from loadtest.bench.chart import draw as draw_chart
    except ImportError:
        errors.print("No chart: matplotlib is missing. pip install -r requirements/loadtest.txt")
        return False
    draw_chart(results, chart)
    return True


if __name__ == "__main__":
    app()
