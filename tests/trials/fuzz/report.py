"""Report a run: its tables, the failed checks, and its figures as JSON."""

import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rich.table import Table

from bundle.machine import cpu_model
from tests.trials.fuzz.inprocess import InProcess
from tests.trials.fuzz.serving import Run, Snapshot
from tests.trials.fuzz.verdict import FAULTS, Tally
from tests.trials.reliability import about

GROWTH = 0.05  # limit: growth of resident memory over the second half of a run


def faults(run: Run) -> list[str]:
    """Return the failed checks, as text."""
    found = []
    for model, tally in run.tallies.items():
        found += [f"{model}: {count} x {kind}" for kind, count in tally.failed.items()]
        if tally.wrong_neighbours:
            found.append(f"{model}: {tally.wrong_neighbours} of {tally.neighbours} neighbours got a wrong answer")
        if count := restarts(run.snapshots, model):
            found.append(f"{model}: {count} worker restarts")
        if (growth := grown(run.snapshots, model)) > GROWTH:
            found.append(f"{model}: its workers' memory grew by {growth:.1%} over the second half")
    if (growth := grown(run.snapshots, None)) > GROWTH:
        found.append(f"the frontend's memory grew by {growth:.1%} over the second half")
    return found


def restarts(snapshots: list[Snapshot], model: str) -> int:
    """Return how many workers were replaced between two snapshots."""
    pairs = zip(snapshots, snapshots[1:], strict=False)
    return sum(len(set(now.pids[model]) - set(before.pids[model])) for before, now in pairs)


def memory(snapshot: Snapshot, model: str | None) -> int:
    """Return the resident bytes of a model's workers, or of the frontend if `model` is None."""
    return snapshot.frontend if model is None else snapshot.workers[model]


def halves(snapshots: list[Snapshot], model: str | None) -> tuple[float, float]:
    """Return the resident bytes after the middle and at the end of the run.

    They are the medians of the third and of the last quarter, because a heap grows and shrinks by dozens of megabytes
    from snapshot to snapshot.
    """
    sizes = [memory(snapshot, model) for snapshot in snapshots[len(snapshots) // 2 :]]
    quarter = (len(sizes) + 1) // 2
    return median(sizes[:quarter]), median(sizes[-quarter:])


def grown(snapshots: list[Snapshot], model: str | None) -> float:
    """Return the growth of memory over the second half of the run, as a share."""
    half, end = halves(snapshots, model)
    return (end - half) / half if half else 0.0


def server_table(run: Run) -> Table:
    """Return the counts of the run: one column per model."""
    table = Table("", *run.tallies, "frontend", title="Against the server")

    def line(name: str, value: Callable[[str, Tally], str], frontend: str = "") -> None:
        table.add_row(name, *(value(model, tally) for model, tally in run.tallies.items()), frontend)

    def in_a_batch(model: str, _: Tally) -> str:
        batches, requests = run.batches.get(model, (0, 0))
        return f"{requests / batches:.1f}" if batches else "-"

    line("sent", lambda _, tally: f"{tally.sent:,}")
    line("2xx", lambda _, tally: f"{tally.served:,}")
    line("4xx", lambda _, tally: f"{tally.rejected.total():,}")
    line("known frontend errors", lambda _, tally: f"{tally.known.total():,}")
    for kind in FAULTS:
        line(kind, lambda _, tally, kind=kind: f"{tally.failed[kind]:,}")
    line("wrong neighbours", lambda _, tally: f"{tally.wrong_neighbours:,} of {tally.neighbours:,}")
    line("worker restarts", lambda model, _: str(restarts(run.snapshots, model)))
    line("slowest answer, s", lambda _, tally: f"{tally.seconds:.1f}")
    line("requests per batch", in_a_batch)
    for index, when in enumerate(("half", "end")):
        line(
            f"resident MB at {when}",
            lambda model, _, index=index: f"{halves(run.snapshots, model)[index] / 1e6:,.0f}",
            f"{halves(run.snapshots, None)[index] / 1e6:,.0f}",
        )
    return table


def types_table(run: Run) -> Table:
    """Return the 4xx by type and the known frontend errors by reason: one row each, one column per model."""
    table = Table("answer", *run.tallies, title="4xx and known frontend errors")
    for kind in ("rejected", "known"):
        counts: dict[str, Counter[str]] = {model: getattr(tally, kind) for model, tally in run.tallies.items()}
        for name in sorted(set().union(*counts.values())):
            table.add_row(name, *(f"{counted[name]:,}" for counted in counts.values()))
    return table


def handlers_table(results: list[InProcess]) -> Table:
    table = Table(
        "model", "requests", "batches", "2xx", "4xx", "failed", "wrong neighbours", "slowest batch s",
        title="Against the handlers",
    )  # fmt: skip
    for one in results:
        numbers = (one.requests, one.batches, one.served, one.rejected.total(), one.failed, one.wrong_neighbours)
        table.add_row(one.model, *(f"{number:,}" for number in numbers), f"{one.slowest:.2f}")
    return table


def section(seed: int, cases: int, run: Run, broken: list[str]) -> str:
    """Return the section of RELIABILITY.md."""
    lines = [
        "## Invalid input",
        "",
        f"`make fuzz CASES={cases} SEED={seed}` sends {cases:,} mutated requests to a server. Neighbours: valid "
        "requests that are sent at the same time, and whose answers are checked. Known: errors that TorchServe's "
        "frontend returns before a handler sees the request "
        "([list](tests/trials/fuzz/README.md#known-frontend-errors)). Other: a 5xx, a late answer, no answer, or an "
        "invalid error body. "
        f"{about()}",
        "",
        "| | sent | 2xx | 4xx | known | other | wrong neighbours | restarts | slowest, s | MB, middle | MB, end |",
        "|---|" + "---|" * 10,
    ]
    for model, tally in run.tallies.items():
        half, end = (round(size / 1e6) for size in halves(run.snapshots, model))
        cells = [tally.sent, tally.served, tally.rejected.total(), tally.known.total(), tally.failed.total()]
        cells += [
            f"{tally.wrong_neighbours} of {tally.neighbours:,}",
            restarts(run.snapshots, model),
            f"{tally.seconds:.1f}",
        ]
        lines.append(
            f"| {model} | " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in (*cells, half, end)) + " |"
        )
    half, end = (round(size / 1e6) for size in halves(run.snapshots, None))
    lines.append(f"| frontend |{' |' * 8} {half:,} | {end:,} |")
    lines.append("")
    lines.append(f"**Failed: {'; '.join(broken)}.**" if broken else "All checks passed.")
    return "\n".join(lines)


def write(file: Path, seed: int, cases: int, run: Run | None, handlers: list[InProcess], passed: bool) -> None:
    """Write the figures behind the tables as JSON."""
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    models = {}
    if run:
        for model, tally in run.tallies.items():
            half, end = halves(run.snapshots, model)
            more = {"restarts": restarts(run.snapshots, model), "memory": {"half": half, "end": end}}
            models[model] = vars(tally) | more | {"batches": run.batches.get(model)}
    figures = {
        "about": machine,
        "seed": seed,
        "cases": cases,
        "passed": passed,
        "seconds": run.seconds if run else None,
        "models": models,
        "frontend": dict(zip(("half", "end"), halves(run.snapshots, None), strict=True)) if run else None,
        "snapshots": [vars(snapshot) for snapshot in run.snapshots] if run else [],
        "handlers": [vars(one) for one in handlers],
    }
    file.write_text(json.dumps(figures, indent=2))
