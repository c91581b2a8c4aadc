"""Write the section of RELIABILITY.md on faults."""

from tests.trials.faults.trial import Outcome, Trial
from tests.trials.reliability import about

COLUMNS = ("sent", "answered", "refused", "failed", "lost", "silence_seconds", "recovery_seconds")
HEAD = """\
## Faults

`make test-faults` injects faults into the Docker stack, with two workers per model, and one of `cells`. It sends
requests at random times and counts every answer. Rejected: 429 or 503 with Retry-After. Failed: any other wrong answer.
Lost: no answer. Gap: the longest time without a correct answer, in seconds. Recovery: seconds until normal service.

All load comes from one client, so the proxy's limits per client are lifted. To keep the trials short, the container
restarts when a model has lacked workers for 15 s instead of 120 s, and `/tmp` has 2 GB instead of 4.
"""


def section(trials: list[Trial], outcomes: dict[str, Outcome], seconds: float) -> str:
    """Return the section as Markdown.

    Args:
        trials: in the order of the table.
        outcomes: by the trials' names.
        seconds: length of a phase of load.
    """
    lines = [HEAD, f"{about()} Load for {seconds:g} s before and after each fault.", ""]
    lines.append("| fault | must hold | sent | answered | rejected | failed | lost | gap | recovery | passed |")
    lines.append("|---|---|" + "---|" * 8)
    for trial in trials:
        row = outcomes[trial.name].row()
        figures = " | ".join("" if row[column] is None else str(row[column]) for column in COLUMNS)
        lines.append(f"| {trial.fault} | {trial.holds} | {figures} | {'**no**' if row['broken'] else 'yes'} |")
    for trial in trials:
        broken = "".join(f" **Not met: {limit}.**" for limit in outcomes[trial.name].broken)
        lines += ["", f"**{trial.name}**: {summary(outcomes[trial.name])}.{broken}"]
    return "\n".join(lines)


def summary(outcome: Outcome) -> str:
    """Return the counted answers and the other measurements as one line."""
    row = outcome.row()
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(row["statuses"].items()))
    return "; ".join([answers, f"p99 of correct answers {row['p99_seconds']:g} s", *row["notes"]])
