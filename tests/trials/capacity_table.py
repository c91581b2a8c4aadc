"""Plan the replicas of the shipped models for several rates, and write the tables of docs/capacity.md.

python -m tests.trials.capacity_table --write

It uses the figures that `bundle capacity` has kept, and measures the models that have none.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from bundle.build.archive import archive
from bundle.capacity.figures import Figures, Identity
from bundle.capacity.planning import Plan, plan
from bundle.capacity.queueing import Balance
from bundle.capacity.report import lines
from bundle.catalog import select
from bundle.cli.capacity import measured, usable
from bundle.cli.console import note
from bundle.errors import BundleError
from bundle.server.process import Server
from bundle.tuning.tuner import read_inputs
from loadtest.bench.inputs import generated
from tests.trials import reliability
from tests.trials.capacity import DOCUMENT, markdown

# one nginx sends the fewest; more than one, each with requests of its own, send like a random choice
RATES: dict[int, Balance] = {1_000: "least", 10_000: "random", 100_000: "random"}
MOST = max(RATES)
# what is sent instead of the sample: a digit as in MNIST, which takes no conversion
SENT = {"mnist": "digit.png"}
TARGET = 0.1  # seconds
TARGETS, SPARES = (0.02, 0.03, 0.05, 0.1, 0.5), (0, 1, 2, 5)  # what each costs, for one model
DRIVEN, DRIVEN_RATE = "image", 1_000


def by_rate(figures: dict[str, Figures]) -> str:
    """Return the replicas and cores of each model, by rate."""
    heads = ["model", "a replica answers up to", "request, answer", *(f"{rate:,}/s" for rate in RATES)]
    rows = [[*heads, f"Mbit/s at {MOST:,}/s"]]
    for name, each in figures.items():
        sizes = f"{each.request_bytes / 1000:.1f} kB, {each.answer_bytes / 1000:.1f} kB"
        cells = [f"`{name}`", f"{each.replica.capacity:,.0f}/s", sizes]
        for rate, balance in RATES.items():
            found = plan(each.replica, rate, TARGET, 1, balance)
            cores = found.replicas * each.of.machine["cores"]
            cells.append(f"{found.replicas:,} replicas, {cores:,} cores, p99 {1000 * found.left.p99:.0f} ms")
        rows.append([*cells, f"{8e-6 * MOST * (each.request_bytes + each.answer_bytes):,.0f}"])
    return markdown(rows)


def drivers(figures: Figures) -> str:
    """Return what a target and spare replicas cost one model."""

    def count(make: Callable[[], Plan]) -> str:
        try:
            return str(make().replicas)
        except BundleError:
            return "impossible"

    heads = ["p99 target", *(f"{spare} spare" for spare in SPARES)]
    rows = [heads]
    for target in TARGETS:
        counts = [count(lambda t=target, s=spare: plan(figures.replica, DRIVEN_RATE, t, s)) for spare in SPARES]
        rows.append([f"{1000 * target:g} ms", *counts])
    return markdown(rows)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="By default, those that are always served.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Measure, also while other processes are busy.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the tables into docs/capacity.md.")] = False,
) -> None:
    """Plan the replicas of models for several rates."""
    figures: dict[str, Figures] = {}
    for folder in select(models or []):
        sent = read_inputs(folder, [generated(SENT[folder.name])] if folder.name in SENT else [])
        built = archive(folder, Server().store).path
        kept = usable(folder, Identity.of(folder, built, sent), anyway)
        figures[folder.name] = kept or measured(folder, built, sent, anyway)
        for line in lines(plan(figures[folder.name].replica, 1000, 1.0, 1), figures[folder.name]):
            note(f"{folder.name}: {line}")
    text = f"{reliability.about()}\n\n{by_rate(figures)}"
    if DRIVEN in figures:
        text += f"\n\nReplicas of `{DRIVEN}` for {DRIVEN_RATE:,} requests/s:\n\n{drivers(figures[DRIVEN])}"
    note(text)
    if write:
        reliability.write_section("table", text, DOCUMENT)


if __name__ == "__main__":
    reliability.run(main, "tests.trials.capacity_table", " image text", " --write")
