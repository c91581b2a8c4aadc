"""The tables of a run, what did not hold, and its figures as JSON."""

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
from tests.trials.fuzz.serving import Look, Run
from tests.trials.fuzz.verdict import FAULTS, Tally
from tests.trials.reliability import about

GROWTH = 0.05  # of resident memory over the last half of a run


def faults(run: Run) -> list[str]:
    """What did not hold, in words; nothing where all did."""
    found = []
    for model, tally in run.tallies.items():
        found += [f"{model}: {count} x {kind}" for kind, count in tally.failed.items()]
        if tally.wrong_neighbours:
            found.append(f"{model}: {tally.wrong_neighbours} of {tally.neighbours} good neighbours answered wrong")
        if count := restarts(run.looks, model):
            found.append(f"{model}: {count} worker restarts")
        if (growth := grown(run.looks, model)) > GROWTH:
            found.append(f"{model}: its workers' memory grew by {growth:.1%} over the last half")
    if (growth := grown(run.looks, None)) > GROWTH:
        found.append(f"the frontend's memory grew by {growth:.1%} over the last half")
    return found


def restarts(looks: list[Look], model: str) -> int:
    """Workers that were others than at the look before."""
    pairs = zip(looks, looks[1:], strict=False)
    return sum(len(set(now.pids[model]) - set(before.pids[model])) for before, now in pairs)


def memory(look: Look, model: str | None) -> int:
    """Resident bytes of a model's workers; of the frontend, where none is named."""
    return look.frontend if model is None else look.workers[model]


def halves(looks: list[Look], model: str | None) -> tuple[float, float]:
    """Memory after the middle of the run and at its end: the medians of its third and of its last quarter, because a
    heap gives back and takes dozens of megabytes from look to look."""
    sizes = [memory(look, model) for look in looks[len(looks) // 2 :]]
    quarter = (len(sizes) + 1) // 2
    return median(sizes[:quarter]), median(sizes[-quarter:])


def grown(looks: list[Look], model: str | None) -> float:
    half, end = halves(looks, model)
    return (end - half) / half if half else 0.0


def server_table(run: Run) -> Table:
    """A column a model."""
    table = Table("", *run.tallies, "frontend", title="Against the server")

    def line(name: str, value: Callable[[str, Tally], str], frontend: str = "") -> None:
        table.add_row(name, *(value(model, tally) for model, tally in run.tallies.items()), frontend)

    def in_a_batch(model: str, _: Tally) -> str:
        batches, requests = run.batches.get(model, (0, 0))
        return f"{requests / batches:.1f}" if batches else "-"

    line("sent", lambda _, tally: f"{tally.sent:,}")
    line("2xx", lambda _, tally: f"{tally.served:,}")
    line("4xx", lambda _, tally: f"{tally.rejected.total():,}")
    line("known answers of the frontend", lambda _, tally: f"{tally.known.total():,}")
    for kind in FAULTS:
        line(kind, lambda _, tally, kind=kind: f"{tally.failed[kind]:,}")
    line("wrong neighbours", lambda _, tally: f"{tally.wrong_neighbours:,} of {tally.neighbours:,}")
    line("worker restarts", lambda model, _: str(restarts(run.looks, model)))
    line("slowest answer, s", lambda _, tally: f"{tally.seconds:.1f}")
    line("requests a batch", in_a_batch)
    for index, when in enumerate(("half", "end")):
        line(
            f"resident MB at {when}",
            lambda model, _, index=index: f"{halves(run.looks, model)[index] / 1e6:,.0f}",
            f"{halves(run.looks, None)[index] / 1e6:,.0f}",
        )
    return table


def types_table(run: Run) -> Table:
    """4xx by type, and the frontend's known answers by reason: a row each, a column a model."""
    table = Table("answered", *run.tallies, title="4xx and known answers")
    for kind in ("rejected", "known"):
        counts: dict[str, Counter[str]] = {model: getattr(tally, kind) for model, tally in run.tallies.items()}
        for name in sorted(set().union(*counts.values())):
            table.add_row(name, *(f"{counted[name]:,}" for counted in counts.values()))
    return table


def handlers_table(results: list[InProcess]) -> Table:
    table = Table(
        "model", "requests", "batches", "2xx", "4xx", "failed", "neighbours wrong", "slowest batch s",
        title="Against the handlers",
    )  # fmt: skip
    for one in results:
        numbers = (one.requests, one.batches, one.served, one.rejected.total(), one.failed, one.wrong_neighbours)
        table.add_row(one.model, *(f"{number:,}" for number in numbers), f"{one.slowest:.2f}")
    return table


def section(seed: int, cases: int, run: Run, broken: list[str]) -> str:
    """The section of RELIABILITY.md."""
    lines = [
        "## Bad input",
        "",
        f"`make fuzz CASES={cases} SEED={seed}`: {cases:,} mutated requests of every shape to a server, "
        "with good ones among them whose answers are checked. A known answer is one that "
        "TorchServe's frontend gives before any handler sees the request "
        "([tests/trials/fuzz](tests/trials/fuzz/README.md)). "
        f"Other: 5xx, late, no answer, or no error body. {about()}",
        "",
        "| | sent | 2xx | 4xx | known | other | wrong neighbours | restarts | slowest, s | MB, middle | MB, end |",
        "|---|" + "---|" * 10,
    ]
    for model, tally in run.tallies.items():
        half, end = (round(size / 1e6) for size in halves(run.looks, model))
        cells = [tally.sent, tally.served, tally.rejected.total(), tally.known.total(), tally.failed.total()]
        cells += [
            f"{tally.wrong_neighbours} of {tally.neighbours:,}",
            restarts(run.looks, model),
            f"{tally.seconds:.1f}",
        ]
        lines.append(
            f"| {model} | " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in (*cells, half, end)) + " |"
        )
    half, end = (round(size / 1e6) for size in halves(run.looks, None))
    lines.append(f"| frontend |{' |' * 8} {half:,} | {end:,} |")
    lines.append("")
    lines.append(f"**It does not hold: {'; '.join(broken)}.**" if broken else "All of it holds.")
    return "\n".join(lines)


def write(file: Path, seed: int, cases: int, run: Run | None, handlers: list[InProcess], held: bool) -> None:
    """The figures behind the tables."""
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    models = {}
    if run:
        for model, tally in run.tallies.items():
            half, end = halves(run.looks, model)
            more = {"restarts": restarts(run.looks, model), "memory": {"half": half, "end": end}}
            models[model] = vars(tally) | more | {"batches": run.batches.get(model)}
    figures = {
        "about": machine,
        "seed": seed,
        "cases": cases,
        "held": held,
        "seconds": run.seconds if run else None,
        "models": models,
        "frontend": dict(zip(("half", "end"), halves(run.looks, None), strict=True)) if run else None,
        "looks": [vars(look) for look in run.looks] if run else [],
        "handlers": [vars(one) for one in handlers],
    }
    file.write_text(json.dumps(figures, indent=2))
