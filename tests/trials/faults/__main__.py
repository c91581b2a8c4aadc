"""Trials of faults on the real Docker stack, under constant load that is counted request by request."""

import time
import traceback
from typing import Annotated

import typer
from rich.table import Table

from bundle.cli.console import console, note, progress
from bundle.errors import UsageError
from tests.docker.stack import Stack, running
from tests.trials import reliability
from tests.trials.faults import load, operation, workers
from tests.trials.faults.report import said, section
from tests.trials.faults.trial import Outcome, Trial

TRIALS: dict[str, Trial] = {
    trial.name: trial for trial in (*workers.TRIALS, *load.TRIALS, *operation.TRIALS)
}  # `rollout` and what comes after it find another version of mnist
SETTINGS = {
    "PROXY_RATE": "10000r/s",  # all load comes from one client here
    "BURST": "10000",
    "CONNECTIONS": "9999",
    "LARGE_BODIES_OF_CLIENT": "9999",
    "PATIENCE_SECONDS": "15",  # so that a trial need not wait two minutes
    "TMP_SIZE": "2g",  # which is soon full
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(TRIALS)}. By default, all.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of a phase of load before and after a fault.")] = 3,
    write: Annotated[
        bool, typer.Option("--write", help="Write the figures of all trials into RELIABILITY.md.")
    ] = False,
) -> None:
    """Inject faults into a Docker stack of its own, and count failed requests.

    Exit with 1 if a limit does not hold.
    """
    if unknown := [name for name in names or [] if name not in TRIALS]:
        raise UsageError(f"There is no trial {unknown[0]!r}; there are: {', '.join(TRIALS)}.")
    if names and write:
        raise UsageError("RELIABILITY.md has all trials. Give --write (REPORT=1) without names of trials.")
    wanted = [TRIALS[name] for name in dict.fromkeys(names or TRIALS)]
    note("Building and starting the stack takes some minutes.")
    with running(("torchserve", "proxy"), **SETTINGS) as stack:
        outcomes = run(stack, wanted, seconds)
    console.print(table(wanted, outcomes))
    for trial in wanted:
        for limit in outcomes[trial.name].broken:
            console.print(f"[red]{trial.name}: it does not hold that {limit}[/red]")
        console.print(f"{trial.name}: {said(outcomes[trial.name])}", markup=False)
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
            held = "held" if not outcomes[trial.name].broken else "DID NOT HOLD"
            note(f"{trial.name}: {held}, {time.monotonic() - began:.0f} s")
            bars.advance(task)
    return outcomes


def outcome_of(trial: Trial, stack: Stack, seconds: float) -> Outcome:
    """A trial that cannot be carried through did not hold; the others go on."""
    try:
        return trial.run(stack, seconds)
    except Exception as exc:
        traceback.print_exc()
        return Outcome([], broken=[f"it can be tried: {type(exc).__name__}: {exc}"])


def table(trials: list[Trial], outcomes: dict[str, Outcome]) -> Table:
    columns = ("sent", "answered", "refused", "failed", "lost", "silence_seconds", "recovery_seconds")
    shown = Table("fault", *(column.replace("_seconds", " s") for column in columns), "holds")
    for trial in trials:
        row = outcomes[trial.name].row()
        cells = ("" if row[column] is None else str(row[column]) for column in columns)
        shown.add_row(trial.name, *cells, "no" if row["broken"] else "yes")
    return shown


if __name__ == "__main__":
    reliability.run(main, "tests.trials.faults", " kill-one overload --seconds 10")
