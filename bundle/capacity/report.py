"""Describe a plan: as a table, in words, and as JSON."""

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bundle.capacity.figures import Figures
from bundle.capacity.planning import Plan

SEVERAL = 3  # times the p99 that the model says: more than chance
NEAR = 0.9  # share of the check's rate from which on a replica of the plan has a load like it
SHARED = 0.05  # share of a machine's cores by which the load generator lowers the figures noticeably


def table(plan: Plan, model: str) -> Table:
    """Return the plan as a table: the load and the latency with all replicas, and without the spare ones."""
    title = (
        f"{model}: {plan.rate:,.6g} requests/s with a p99 of {1000 * plan.target:g} ms need {plan.replicas} replicas"
    )
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for head in ("", "replicas", "requests/s each", "load", "p50 ms", "p99 ms"):
        shown.add_column(head, justify="right" if head else "left", no_wrap=True)
    rows = [("all", plan.replicas, plan.load, plan.whole)]
    if plan.spare:
        rows.append((f"{plan.spare} missing", plan.replicas - plan.spare, plan.load_left, plan.left))
    for name, replicas, load, seconds in rows:
        cells = (name, f"{replicas:,}", f"{plan.rate / replicas:,.1f}", f"{load:.0%}")
        shown.add_row(*cells, f"{1000 * seconds.p50:.1f}", f"{1000 * seconds.p99:.1f}")
    return shown


def lines(plan: Plan, figures: Figures) -> list[str]:
    """Return lines about the size of a replica, the whole, the figures, and how well the model fits them.

    A warning is the last.
    """
    settings, machine, replica = figures.of.settings, figures.of.machine, figures.replica
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    memory = f", {figures.memory / 2**30:.1f} GiB of memory for the workers" if figures.memory else ""
    cores = plan.replicas * machine["cores"]
    found = [
        f"a replica: {machine['cores']} cores, {gpus}, {settings}{memory}; it answers up to {replica.capacity:,.4g}/s",
        f"in all: {cores:,} cores, which is {1000 * cores / plan.rate:.3g} for each 1,000 requests/s; "
        f"{8e-6 * plan.rate * (figures.request_bytes + figures.answer_bytes):,.3g} Mbit/s of bodies",
        f"figures: {figures.source}, {figures.date}, {machine['cpu']}, {machine['cores']} cores; {others(figures)}",
    ]
    if (seen := figures.check) and (predicted := figures.predicted):
        rate = seen.throughput
        found.append(
            f"check: at {rate:,.4g}/s ({rate / replica.capacity:.0%}), one replica was measured with p50 "
            f"{1000 * seen.p50:.1f} ms, p99 {1000 * seen.p99:.1f} ms; the model says {1000 * predicted.p50:.1f} and "
            f"{1000 * predicted.p99:.1f} ms"
        )
        if plan.balance == "least" and plan.replicas - plan.spare > 1:
            found.append(
                "The check is of one replica alone. In the plan, each request goes to the replica with the fewest in "
                "flight: it waits less, so the p99 at the same load is shorter."
            )
    if figures.load_cores > SHARED * machine["cores"]:
        found.append(
            f"The load generator took {figures.load_cores:.2f} of the cores while it measured: replicas that have all "
            "cores for themselves can do more."
        )
    return found + warnings(plan, figures)


def warnings(plan: Plan, figures: Figures) -> list[str]:
    """Return a warning if the check contradicts the plan."""
    seen, predicted, faults = figures.check, figures.predicted, []
    if not seen or not predicted:
        return []
    # the replicas of a plan may have less to do than that of the check, and keep the target because of it
    if seen.p99 > plan.target and plan.rate >= NEAR * seen.throughput * (plan.replicas - plan.spare):
        faults.append(f"above the target of {1000 * plan.target:g} ms")
    if seen.p99 > SEVERAL * predicted.p99:
        faults.append(f"{seen.p99 / predicted.p99:.1f} times what the model says")
    if not faults:
        return []
    return [
        f"warning: one replica was measured with a p99 of {1000 * seen.p99:.1f} ms, {' and '.join(faults)}. The plan's "
        "p99 is the model's, and real replicas may exceed it: other programs and Java's garbage collector cause pauses "
        "that the model does not know. Measure again while nothing else runs: --again, or AGAIN=1 of make. If this "
        "stays, choose a longer target, or load real replicas and look at their p99 (make loadtest)."
    ]


def others(figures: Figures) -> str:
    """Return how much of the CPU other processes used meanwhile, in words."""
    if figures.others is None:
        return "how much of the CPU other processes used meanwhile is unknown"
    accepted = ", accepted with --anyway" if figures.disturbed else ""
    return f"other processes used {figures.others:.0%} of the CPU meanwhile{accepted}"


def as_dict(plan: Plan, figures: Figures) -> dict:
    """Return the plan, what it is made of, and the figures, for JSON; all times are in seconds."""
    replica = figures.replica
    return {
        **asdict(plan),
        "load": plan.load,
        "load_left": plan.load_left,
        "replica": {
            "capacity": replica.capacity,
            "service": replica.service,
            "transit": replica.transit,
            "cores": figures.of.machine["cores"],
        },
        "figures": asdict(figures),
        "check_by_model": asdict(figures.predicted) if figures.predicted else None,
        "warnings": warnings(plan, figures),
    }
