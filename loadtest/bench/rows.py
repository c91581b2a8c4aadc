"""The rows of the report: one system at one number of clients, over all rounds."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from loadtest.bench.cases import CASES
from loadtest.bench.results import FLOOR, OURS, Measurement, Results, is_peer


@dataclass(frozen=True)
class Row:
    """One system at one number of clients: medians over the rounds, sum of failures, largest memory.

    Attributes:
        spread: lowest and highest throughput of the rounds; None if there was only one.
        to_best_peer: ratio of the throughput to the best peer's at the same number of clients; None without a peer.
        to_limit: ratio of the throughput to the system's own limit; None if that was not measured.
    """

    system: str
    clients: int
    throughput: float
    spread: tuple[float, float] | None
    p50: float
    p99: float
    failed: int
    is_sound: bool
    cpu_per_request: float
    memory: float
    to_best_peer: float | None = None
    to_limit: float | None = None


def closed_rows(results: Results, case: str) -> list[Row]:
    """Return the rows of a case by number of clients, the fastest system first."""
    groups: dict[tuple[int, str], list[Measurement]] = defaultdict(list)
    for one in results.measurements:
        if one.case == case and one.clients is not None:
            groups[one.clients, one.system].append(one)
    best: dict[int, float] = defaultdict(float)
    for (clients, system), seen in groups.items():
        if is_peer(system) and results.is_sound(case, system, seen):
            best[clients] = max(best[clients], throughput(seen))

    def own_limit(system: str, clients: int) -> float | None:
        limits, floor = results.limits.get(case, {}), groups.get((clients, FLOOR))
        if is_peer(system):
            return limits["pipeline"].rate if "pipeline" in limits else None
        if system == OURS and "handler" in limits and floor and (reached := throughput(floor)):
            return 1 / (1 / reached + 1 / limits["handler"].rate)
        return None

    rows = [
        Row(
            system=system,
            clients=clients,
            throughput=throughput(seen),
            spread=spread(seen),
            p50=median([one.load.p50 for one in seen]),
            p99=median([one.load.p99 for one in seen]),
            failed=sum(one.load.failed for one in seen),
            is_sound=results.is_sound(case, system, seen),
            cpu_per_request=median([one.cpu_per_request for one in seen]),
            memory=max(one.memory for one in seen),
            to_best_peer=throughput(seen) / best[clients] if best[clients] and system != FLOOR else None,
            to_limit=throughput(seen) / limit if (limit := own_limit(system, clients)) else None,
        )
        for (clients, system), seen in groups.items()
    ]
    return sorted(rows, key=lambda row: (row.clients, -row.throughput))


def throughput(seen: list[Measurement]) -> float:
    return median([one.load.throughput for one in seen])


def spread(seen: list[Measurement]) -> tuple[float, float] | None:
    rates = [one.load.throughput for one in seen]
    return (min(rates), max(rates)) if len(rates) > 1 else None


def measured_cases(results: Results) -> list[str]:
    seen = {one.case for one in results.measurements}
    return [case for case in CASES if case in seen]
