"""Send mutated requests to the handlers and to a server, and check every answer."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from bundle.cli import console as terminal
from bundle.cli.console import console, errors
from bundle.cli.parameters import choice
from bundle.errors import BundleError
from bundle.server.process import Server
from tests.server.conftest import new_place
from tests.trials.fuzz import inprocess, report
from tests.trials.fuzz.cases import case
from tests.trials.fuzz.corpus import MODELS
from tests.trials.fuzz.findings import FOLDER, Findings
from tests.trials.fuzz.serving import Fuzzer, Run
from tests.trials.reliability import write_section

app = terminal.program(__doc__)

SHOWN = 10  # findings on the terminal; build/fuzz/findings.json has all

Cases = Annotated[int, typer.Option(min=1, help="Number of mutated requests.")]
Seed = Annotated[int, typer.Option(help="Random seed. The same seed generates the same requests.")]
Write = Annotated[bool, typer.Option("--write", help="Write the server's results into RELIABILITY.md.")]
OneModel = typer.Option("--model", parser=choice(*MODELS), metavar="MODEL", help=f"One of: {', '.join(MODELS)}.")
Model = Annotated[str | None, OneModel]


@app.callback(
    invoke_without_command=True,
    epilog="Examples: `python -m tests.trials.fuzz` · `python -m tests.trials.fuzz --cases 100000 --model audio`",
)
def everything(
    context: typer.Context,
    cases: Cases = 5000,
    seed: Seed = 0,
    model: Model = None,
    write: Write = False,
) -> None:
    """Fuzz the handlers, then a server that this command starts. The exit status is 1 if a check fails."""
    if context.invoked_subcommand:
        return
    models, findings = chosen(model), Findings()
    handled = against_handlers(models, seed, cases, findings)
    run = against_server(models, seed, cases, findings)
    conclude(seed, cases, handled, run, findings, write)


@app.command()
def handlers(cases: Cases = 5000, seed: Seed = 0, model: Model = None) -> None:
    """Fuzz the handlers in this process, without a server."""
    findings = Findings()
    conclude(seed, cases, against_handlers(chosen(model), seed, cases, findings), None, findings)


@app.command()
def server(cases: Cases = 5000, seed: Seed = 0, model: Model = None, write: Write = False) -> None:
    """Fuzz only a server that this command starts."""
    findings = Findings()
    conclude(seed, cases, [], against_server(chosen(model), seed, cases, findings), findings, write)


@app.command("atheris")
def decoders(
    model: Annotated[str, OneModel],
    seconds: Annotated[int, typer.Option(min=1, help="Length of the run.")] = 60,
) -> None:
    """Fuzz a model's decoder with atheris, guided by coverage."""
    # a new process, because atheris can only instrument modules that are not imported yet
    os.execv(sys.executable, [sys.executable, "-m", "tests.trials.fuzz.decoders", model, str(seconds)])


@app.command()
def show(
    number: Annotated[int, typer.Argument(help="Number of the case.")],
    seed: Seed = 0,
    model: Model = None,
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8080",
) -> None:
    """Write a case's body to build/fuzz, and print the command that sends it.

    Use the same --seed and --model as in the run.
    """
    one = case(seed, number, chosen(model))
    console.print(f"# {one.origin}", markup=False)
    console.print(Findings().write(one, url), markup=False, soft_wrap=True)


def chosen(model: str | None) -> tuple[str, ...]:
    return (model,) if model else MODELS


@contextmanager
def progress(title: str, total: int) -> Iterator:
    """Show a progress bar, and yield a function that advances it by a number of cases."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with terminal.progress(*columns) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.advance(task, done)


def against_handlers(models: tuple[str, ...], seed: int, cases: int, findings: Findings) -> list[inprocess.InProcess]:
    build(models)
    with progress("handlers", cases) as advance:
        return [inprocess.fuzz(model, models, seed, cases, findings, advance) for model in models]


def against_server(models: tuple[str, ...], seed: int, cases: int, findings: Findings) -> Run:
    """Start a server on free ports, fuzz it, and stop it, also after errors and Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = new_place(Path(folder))
        try:
            with errors.status(f"starting a server with {', '.join(models)}"):
                started = place.bundle("serve", *models)
            if started.returncode:
                raise BundleError("The server did not start.", started.stdout + started.stderr)
            pid = Server(Path(folder)).running().pid
            with progress("server", cases) as advance:
                fuzzer = Fuzzer(place.client, place.url("metrics_address"), pid, models, seed, findings, advance)
                return asyncio.run(fuzzer.fuzz(cases))
        finally:
            place.bundle("stop")


def build(models: tuple[str, ...]) -> None:
    from bundle.build.archive import archive
    from bundle.catalog import select
    from bundle.paths import MODEL_STORE

    for folder in select(list(models)):
        archive(folder, MODEL_STORE, False)


def conclude(
    seed: int,
    cases: int,
    handled: list[inprocess.InProcess],
    run: Run | None,
    findings: Findings,
    write: bool = False,
) -> None:
    """Print the tables, write the figures, and exit with status 1 if a check failed."""
    wrong = [f"{one.model}, its handler: {one.failed} failed, {one.wrong_neighbours} neighbours got a wrong answer"
             for one in handled if not one.passed]  # fmt: skip
    if handled:
        console.print(report.handlers_table(handled))
    if run:
        wrong += report.faults(run)
        console.print(report.server_table(run))
        console.print(report.types_table(run))
        console.print(f"{run.seconds:.0f} s against the server, seed {seed}.")
    report.write(FOLDER / "results.json", seed, cases, run, handled, passed=not wrong)
    if run and write:
        write_section("fuzz", report.section(seed, cases, run, wrong))
    if not wrong:
        console.print(f"All checks passed, for {cases:,} cases.")
        return
    for one in findings.found[:SHOWN]:
        errors.print(
            f"{one['kind']}: {one['case']}\n  {one['answer']}\n  {one['repeat']}", markup=False, soft_wrap=True
        )
    for line in wrong:
        errors.print(line, style="bold red", markup=False)
    errors.print("All findings are in build/fuzz/findings.json, and their requests in the same folder.", markup=False)
    raise typer.Exit(1)


if __name__ == "__main__":
    terminal.run(app, "python -m tests.trials.fuzz")
