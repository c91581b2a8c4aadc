"""The section of RELIABILITY.md on faults."""

from tests.trials.faults.trial import Outcome, Trial
from tests.trials.reliability import about

COLUMNS = ("sent", "answered", "refused", "failed", "lost", "silence_seconds", "recovery_seconds")
HEAD = """\
## Faults

`make test-faults`, on the Docker stack (two workers a model), with requests at random times whose answers are counted
one by one. Refused: 429 or 503 with Retry-After. Failed: any other answer that is not right. Lost: no answer at all.
Silence: the longest time without a right answer, in seconds. Recovery: seconds until full strength.

All load comes from one client, so the proxy's limits for one client are lifted; and for the trials to take minutes, a
model may lack workers for 15 s, not for 120 s, until the container starts anew, and `/tmp` has 2 GB, not 4.
"""


def section(trials: list[Trial], outcomes: dict[str, Outcome], seconds: float) -> str:
    lines = [HEAD, f"{about()} Load for {seconds:g} s before and after each fault.", ""]
    lines.append("| fault | must hold | sent | answered | refused | failed | lost | silence | recovery | holds |")
    lines.append("|---|---|" + "---|" * 8)
    for trial in trials:
        row = outcomes[trial.name].row()
        figures = " | ".join("" if row[column] is None else str(row[column]) for column in COLUMNS)
        lines.append(f"| {trial.fault} | {trial.holds} | {figures} | {'**no**' if row['broken'] else 'yes'} |")
    for trial in trials:
        broken = "".join(f" **It does not hold that {limit}.**" for limit in outcomes[trial.name].broken)
        lines += ["", f"**{trial.name}**: {said(outcomes[trial.name])}.{broken}"]
    return "\n".join(lines)


def said(outcome: Outcome) -> str:
    """What was answered, and what else was measured."""
    row = outcome.row()
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(row["statuses"].items()))
    return "; ".join([answers, f"p99 of what was right {row['p99_seconds']:g} s", *row["notes"]])
