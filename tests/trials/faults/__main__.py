"""Inject faults into a real Docker stack under load, and count every answer."""

import time
import traceback
from typing import Annotated

import typer
from rich.table import Table

from bundle.cli.console import console, note, progress
from bundle.errors import UsageError
from tests.docker.stack import Stack, running
from tests.trials import reliability
from tests.trials.faults import load, on_request, operation, workers
from tests.trials.faults.report import section, summary
from tests.trials.faults.trial import Outcome, Trial

TRIALS: dict[str, Trial] = {
    trial.name: trial for trial in (*workers.TRIALS, *load.TRIALS, *on_request.TRIALS, *operation.TRIALS)
}  # the order matters: `rollout` and the trials after it find another version of mnist
SETTINGS = {
    "PROXY_RATE": "10000r/s",  # all load comes from one client here
    "BURST": "10000",
    "CONNECTIONS": "9999",
    "LARGE_BODIES_OF_CLIENT": "9999",
    "PATIENCE_SECONDS": "15",  # instead of two minutes, to keep the trials short
    "TMP_SIZE": "2g",  # small, so that a trial can fill it
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"The trials: {', '.join(TRIALS)}. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of load before and after each fault.")] = 3,
    write: Annotated[
        bool, typer.Option("--write", help="Write the results of all trials into RELIABILITY.md.")
    ] = False,
) -> None:
    """Start a Docker stack, inject faults into it, and count failed requests.

    The exit status is 1 if a limit is not met.
    """
    if unknown := [name for name in names or [] if name not in TRIALS]:
        raise UsageError(f"There is no trial {unknown[0]!r}. Choose from: {', '.join(TRIALS)}.")
    if names and write:
        raise UsageError("RELIABILITY.md needs the results of all trials. Use --write (REPORT=1) without trial names.")
    wanted = [TRIALS[name] for name in dict.fromkeys(names or TRIALS)]
    note("Building and starting the stack takes some minutes.")
    with running(("torchserve", "proxy"), **SETTINGS) as stack:
        outcomes = run(stack, wanted, seconds)
    console.print(table(wanted, outcomes))
    for trial in wanted:
        for limit in outcomes[trial.name].broken:
            console.print(f"[red]{trial.name}: not met: {limit}[/red]")
        console.print(f"{trial.name}: {summary(outcomes[trial.name])}", markup=False)
    if write:
        reliability.write_section("faults", section(wanted, outcomes, seconds))
        console.print("RELIABILITY.md is written.")
    raise typer.Exit(1 if any(outcome.broken for outcome in outcomes.values()) else 0)


def run(stack: Stack, trials: list[Trial], seconds: float) -> dict[str, Outcome]:
    outcomes = {}
    with progress() as bars:
        task = bars.add_task("", total=len(trials), state="")
        for trial in trials:
            bars.update(task, description=trial.name)
            began = time.monotonic()
            outcomes[trial.name] = outcome_of(trial, stack, seconds)
            result = "passed" if not outcomes[trial.name].broken else "FAILED"
            note(f"{trial.name}: {result}, {time.monotonic() - began:.0f} s")
            bars.advance(task)
    return outcomes


def outcome_of(trial: Trial, stack: Stack, seconds: float) -> Outcome:
    """Run a trial. If it raises, it has failed, and the other trials still run."""
    try:
        return trial.run(stack, seconds)
    except Exception as exc:
        traceback.print_exc()
        return Outcome([], broken=[f"the trial runs to its end: {type(exc).__name__}: {exc}"])


def table(trials: list[Trial], outcomes: dict[str, Outcome]) -> Table:
    columns = ("sent", "answered", "refused", "failed", "lost", "silence_seconds", "recovery_seconds")
    heads = ("sent", "answered", "rejected", "failed", "lost", "gap s", "recovery s")
    shown = Table("fault", *heads, "passed")
    for trial in trials:
        row = outcomes[trial.name].row()
        cells = ("" if row[column] is None else str(row[column]) for column in columns)
        shown.add_row(trial.name, *cells, "no" if row["broken"] else "yes")
    return shown


if __name__ == "__main__":
    reliability.run(main, "tests.trials.faults", " kill-one overload --seconds 10")
