"""Successive halving under a budget of time: all candidates are measured a little, the better half twice as long, and
so on; the last few are measured in turns, together with the settings that there are.

Every round gets the same share of the time that is left (Karnin, Koren, Somekh 2013: "sequential halving"), so the
field halves and each measurement doubles. It needs no model of how settings act (Jamieson, Talwalkar 2016), and takes
its time where noise matters: between candidates that are near each other. The first field is a sparse sample, so up to
half of the places of each next one go to neighbours of the leader that were not tried.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import median

from bundle.load.generator import Load
from bundle.tuning.space import Candidate

COARSE = (1, 4, 16, 64, 256)  # clients, on the first climb
LARGEST_LOAD = 256
FINALISTS = 2  # beside the current settings
REPEATS = 3  # of the finals
EXPECTED_RUNGS = 4  # of a climb, before it misses the target
SHORTEST, LONGEST = 1.0, 8.0  # seconds at a rung
ENOUGH = 50  # answers to one client, for a 99th percentile to be of use; where that takes too long, fewer
LEAST_GAIN = 0.05  # of throughput: what is less may be noise, and is not worth a change
UTILISATION = 0.7  # of its throughput, at which a finalist must answer in time whenever requests come
FINAL = "final"

Judge = Callable[[Sequence[Candidate], int, int], "dict[Candidate, Score]"]
Neighbours = Callable[[Candidate], list[Candidate]]


@dataclass(frozen=True)
class Point:
    """What a candidate did under one load.

    Attributes:
        stage: `round 1`, ...; `final`.
        concurrency: clients, each waiting for its answer.
    """

    candidate: Candidate
    stage: str
    concurrency: int
    load: Load


@dataclass(frozen=True, order=True)
class Score:
    """How good a candidate is: by throughput within the target; where it never was within, by how near it came.

    Attributes:
        throughput: the best with p99 in the target and nothing failed; 0 where there is none.
        nearness: the lowest p99 without a failure (s), negative.
        concurrency: at which it did so.
    """

    throughput: float
    nearness: float
    concurrency: int


def meets(load: Load, target: float) -> bool:
    return load.failed == 0 and load.p99 <= target


def score(loads: dict[int, Load], target: float) -> Score:
    """Args:
    loads: by concurrency.
    target: seconds.
    """
    within = {concurrency: load for concurrency, load in loads.items() if meets(load, target)}
    if within:
        concurrency = max(within, key=lambda each: within[each].throughput)
        return Score(within[concurrency].throughput, -within[concurrency].p99, concurrency)
    whole = {concurrency: load for concurrency, load in loads.items() if not load.failed}
    nearest = min(whole, key=lambda each: whole[each].p99, default=1)
    return Score(0.0, -whole[nearest].p99 if whole else -inf, nearest)


def climb(measure: Callable[[int], Load], rungs: Iterable[int], target: float) -> dict[int, Load]:
    """Raises the load until requests fail, or take too long, which more of them only would longer, or until it has
    brought nothing twice in a row. Where even the lowest is too much, lowers it.
    """
    loads = {}
    best = in_vain = 0
    for concurrency in rungs:
        load = loads[concurrency] = measure(concurrency)
        in_vain = 0 if load.throughput > (1 + LEAST_GAIN) * best else in_vain + 1
        best = max(best, load.throughput)
        # with half of the answers well in time, a few late ones may have been the machine's
        if load.failed or (load.p99 > target and load.p50 > target / 2) or in_vain == 2:
            break
    lowest = min(loads)
    while lowest > 1 and not any(meets(load, target) for load in loads.values()):
        lowest //= 2
        loads[lowest] = measure(lowest)
    return loads


def rising(concurrency: int) -> list[int]:
    """The rungs of a later climb: finer, from a little below where the last one was best."""
    start = max(1, concurrency // 2)
    return [start * 2**step for step in range(LARGEST_LOAD.bit_length()) if start * 2**step <= LARGEST_LOAD]


def halve(field: Sequence[Candidate], judge: Judge, neighbours: Neighbours = lambda leader: []) -> list[Candidate]:
    """Args:
        field: who takes part.
        judge: measures a field, given the number of the round, from 1, and how many rounds are left with this one, the
            final included. Whom it leaves out drops out.
        neighbours: of a candidate, the best first.

    Returns:
        the finalists, best first.
    """
    field, tried, number = list(field), set(field), 1
    while True:
        scores = judge(field, number, rounds(len(field)) + 1)
        if not scores:
            return field[:FINALISTS]
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        places = max(FINALISTS, ceil(len(field) / 2))
        if places == FINALISTS:
            return ranked[:FINALISTS]
        new = [each for each in neighbours(ranked[0]) if each not in tried][: places // 2]
        field, tried, number = ranked[: places - len(new)] + new, tried | set(new), number + 1


def rounds(count: int) -> int:
    """How many rounds a field of `count` goes through before the final."""
    return 1 if count <= 2 * FINALISTS else 1 + rounds(ceil(count / 2))


def affordable(budget: float, start: float, shortest: float) -> int:
    """How many candidates to begin with, so that the first round takes no more than its share; at least 2.

    Args:
        budget: seconds.
        start: seconds until a candidate serves.
        shortest: seconds at a rung.
    """
    each = start + EXPECTED_RUNGS * shortest
    count = 2
    while (count + 1) * each <= budget / (rounds(count + 1) + 1):
        count += 1
    return count


def shortest(alone: float, inputs: int) -> float:
    """Seconds that a measurement must take at least.

    Args:
        alone: seconds that one client waits for its answer.
        inputs: that take turns.
    """
    return max(SHORTEST, 0.5 * inputs, min(ENOUGH * alone, LONGEST / 2))


def seconds_at_a_rung(share: float, starts: int, start: float, rungs: int, shortest: float) -> float:
    """What a share of the budget leaves for one measurement, after `starts` starts."""
    return min(max((share - starts * start) / rungs, shortest), max(LONGEST, shortest))


def middle(loads: Sequence[Load]) -> Load:
    """The medians of repeated measurements; failures are summed up."""
    medians = {
        name: median(getattr(load, name) for load in loads)
        for name in ("seconds", "answered", "throughput", "p50", "p95", "p99", "longest")
    }
    return Load(**medians, failed=sum(load.failed for load in loads))


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    best: the finalist with the highest score.
    scores: of all finalists, by their medians.
    replaces: whether it takes the place of the current settings.
    reason: why, or why not.
    """

    best: Candidate
    scores: dict[Candidate, Score]
    replaces: bool
    reason: str


def decide(
    final: dict[Candidate, list[dict[int, Load]]], steady: dict[Candidate, Load], current: Candidate, target: float
) -> Verdict:
    """Args:
    final: of each finalist, the loads by concurrency, in each repeat.
    steady: of each finalist, requests at random times, at `UTILISATION` of its throughput. Clients that wait for
        their answers fill batches in step, which others do not: who is late here has no throughput.
    """
    scores = {candidate: score(medians(repeats), target) for candidate, repeats in final.items()}
    for candidate, load in steady.items():
        if not meets(load, target):
            scores[candidate] = Score(0.0, -load.p99 if not load.failed else -inf, scores[candidate].concurrency)
    best = max(scores, key=scores.__getitem__)
    won, held = scores[best], scores.get(current)
    if best == current:
        return Verdict(best, scores, False, "No other settings that were tried are better.")
    if held is None or not held.throughput:
        return Verdict(best, scores, won.throughput > 0, "The current settings miss the target.")
    gain = won.throughput / held.throughput - 1
    if gain < LEAST_GAIN:
        return Verdict(best, scores, False, f"The best settings are {gain:.1%} better: less than {LEAST_GAIN:.0%}.")
    turns = [
        (mine[won.concurrency].throughput, its[held.concurrency].throughput)
        for mine, its in zip(final[best], final[current], strict=True)
        if won.concurrency in mine and held.concurrency in its
    ]
    ahead = sum(mine > its for mine, its in turns)
    if ahead < len(turns):
        reason = f"The best settings are {gain:.1%} better by medians, but in {ahead} of {len(turns)} turns only."
        return Verdict(best, scores, False, f"{reason} More time, or a quieter machine, may tell.")
    return Verdict(best, scores, True, f"{gain:.0%} more throughput within the target, ahead in every turn.")


def medians(repeats: list[dict[int, Load]]) -> dict[int, Load]:
    """The middle of the repeats, at the concurrencies that more than half of them have."""
    loads: dict[int, list[Load]] = {}
    for repeat in repeats:
        for concurrency, load in repeat.items():
            loads.setdefault(concurrency, []).append(load)
    return {concurrency: middle(found) for concurrency, found in sorted(loads.items()) if 2 * len(found) > len(repeats)}


def summary(points: Iterable[Point]) -> list[Point]:
    """One point for each candidate and concurrency: the middle of the final's, or else the last."""
    groups: dict[tuple[Candidate, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.candidate, point.concurrency), []).append(point)
    found = []
    for (candidate, concurrency), group in groups.items():
        last = group[-1]
        final = [point.load for point in group if point.stage == FINAL]
        found.append(Point(candidate, last.stage, concurrency, middle(final) if final else last.load))
    return found


def front(points: Iterable[Point]) -> list[Point]:
    """The Pareto front: points without failures, none of which another beats in throughput and in p99; by p99."""
    front: list[Point] = []
    whole = [point for point in points if not point.load.failed and point.load.answered]
    for point in sorted(whole, key=lambda point: (point.load.p99, -point.load.throughput)):
        if not front or point.load.throughput > front[-1].load.throughput:
            front.append(point)
    return front
