"""Search by successive halving, within a limited time.

The first round measures all candidates briefly, the next one measures the better half twice as long, and so on. The
final measures the last few candidates in turns, together with the current settings.

Each round gets the same share of the remaining time (Karnin, Koren, Somekh 2013: "sequential halving"): the number of
candidates halves, and the time of a measurement doubles. The method needs no model of how the settings act (Jamieson,
Talwalkar 2016), and spends most time on candidates that are nearly equal, where noise matters. The first candidates are
a sparse sample. Therefore up to half of the places in each later round go to new neighbours of the best candidate.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import median

from bundle.load.generator import LoadResult
from bundle.tuning.space import Candidate

# A climb raises the number of clients in steps, the rungs.
COARSE = (1, 4, 16, 64, 256)  # clients at the rungs of a candidate's first climb
LARGEST_LOAD = 256  # clients
FINALISTS = 2  # besides the current settings
REPEATS = 3  # of the final's measurements
EXPECTED_RUNGS = 4  # of a climb, until the target is missed
SHORTEST, LONGEST = 1.0, 8.0  # seconds of a measurement
ENOUGH = 50  # answers to one client that give a usable p99; fewer if that takes too long
LEAST_GAIN = 0.05  # of throughput: a smaller gain may be noise, and is not worth a change
UTILISATION = 0.7  # share of its throughput at which a finalist must keep the target with requests at random times
LEAST_ARRIVALS = 3.0  # seconds of a measurement with requests at random times: one second of them decides nothing
LOWER = 0.9  # of a throughput: the next lower load that is worth a measurement
FINAL = "final"

Judge = Callable[[Sequence[Candidate], int, int], "dict[Candidate, Score]"]
Neighbours = Callable[[Candidate], list[Candidate]]


@dataclass(frozen=True)
class Point:
    """A measurement of a candidate.

    Attributes:
        stage: `round 1`, `round 2` and so on, or `final`.
        concurrency: number of clients that each wait for their answer.
    """

    candidate: Candidate
    stage: str
    concurrency: int
    load: LoadResult


@dataclass(frozen=True, order=True)
class Score:
    """A candidate's score: its throughput within the target or, if it missed the target, how close it came.

    Attributes:
        throughput: the highest with a p99 within the target and no failed request, in answers/s; 0 if there is none.
        nearness: minus the p99 of that measurement, or minus the lowest p99 without failures, in seconds.
        concurrency: number of clients of that measurement.
    """

    throughput: float
    nearness: float
    concurrency: int


def meets(load: LoadResult, target: float) -> bool:
    """Return whether the load kept the target (s) without a failed request."""
    return load.failed == 0 and load.p99 <= target


def score(loads: dict[int, LoadResult], target: float) -> Score:
    """Return a candidate's score.

    Args:
        loads: its measurements, by concurrency.
        target: of the p99 latency, in seconds.
    """
    within = {concurrency: load for concurrency, load in loads.items() if meets(load, target)}
    if within:
        concurrency = max(within, key=lambda each: within[each].throughput)
        return Score(within[concurrency].throughput, -within[concurrency].p99, concurrency)
    whole = {concurrency: load for concurrency, load in loads.items() if not load.failed}
    nearest = min(whole, key=lambda each: whole[each].p99, default=1)
    return Score(0.0, -whole[nearest].p99 if whole else -inf, nearest)


def climb(measure: Callable[[int], LoadResult], rungs: Iterable[int], target: float) -> dict[int, LoadResult]:
    """Raise the number of clients until requests fail or take too long, or until two steps brought no gain.

    If no rung meets the target, lower the number of clients below the first rung.

    Args:
        measure: measures the load of a number of clients.
        rungs: the numbers of clients.
        target: of the p99 latency, in seconds.

    Returns:
        the measurements, by concurrency.
    """
    loads = {}
    best, without_gain = 0.0, 0
    for concurrency in rungs:
        load = loads[concurrency] = measure(concurrency)
        without_gain = 0 if load.throughput > (1 + LEAST_GAIN) * best else without_gain + 1
        best = max(best, load.throughput)
        # if half of the answers are far below the target, other processes may have delayed the late ones
        if load.failed or (load.p99 > target and load.p50 > target / 2) or without_gain == 2:
            break
    lowest = min(loads)
    while lowest > 1 and not any(meets(load, target) for load in loads.values()):
        lowest //= 2
        loads[lowest] = measure(lowest)
    return loads


def rising(concurrency: int) -> list[int]:
    """Return the rungs of a later climb: in finer steps, from half of the best concurrency of the last one."""
    start = max(1, concurrency // 2)
    return [start * 2**step for step in range(LARGEST_LOAD.bit_length()) if start * 2**step <= LARGEST_LOAD]


def halve(field: Sequence[Candidate], judge: Judge, neighbours: Neighbours = lambda leader: []) -> list[Candidate]:
    """Halve the candidates round by round.

    Args:
        field: the candidates of the first round.
        judge: measures a round, given its candidates, its number (from 1), and the number of rounds that are left (this
            one and the final included). A candidate without a score drops out.
        neighbours: returns the neighbours of a candidate, the most promising first.

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
    """Return the number of rounds before the final, for `count` candidates."""
    return 1 if count <= 2 * FINALISTS else 1 + rounds(ceil(count / 2))


def affordable(budget: float, start: float, shortest: float) -> int:
    """Return with how many candidates the first round takes at most its share of the time; at least 2.

    Args:
        budget: the time of the search, in seconds.
        start: seconds until a candidate serves.
        shortest: seconds of a measurement.
    """
    each = start + EXPECTED_RUNGS * shortest
    count = 2
    while (count + 1) * each <= budget / (rounds(count + 1) + 1):
        count += 1
    return count


def shortest(alone: float, inputs: int) -> float:
    """Return the shortest time of a measurement, in seconds.

    Args:
        alone: seconds that a single client waits for its answer.
        inputs: number of inputs that take turns.
    """
    return max(SHORTEST, 0.5 * inputs, min(ENOUGH * alone, LONGEST / 2))


def seconds_at_a_rung(share: float, starts: int, start: float, rungs: int, shortest: float) -> float:
    """Return the time of one measurement of a round, in seconds.

    Args:
        share: of the round, in seconds.
        starts: number of candidates that the round starts.
        start: seconds of a start.
        rungs: number of measurements in the round.
        shortest: the shortest time of a measurement, in seconds.
    """
    return min(max((share - starts * start) / rungs, shortest), max(LONGEST, shortest))


def middle(loads: Sequence[LoadResult]) -> LoadResult:
    """Return the medians of repeated measurements, with the sum of their failures."""
    medians = {
        name: median(getattr(load, name) for load in loads)
        for name in ("seconds", "answered", "throughput", "p50", "p95", "p99", "longest")
    }
    return LoadResult(**medians, failed=sum(load.failed for load in loads))


@dataclass(frozen=True)
class Arrivals:
    """A finalist's last measurement with requests at random times.

    Attributes:
        concurrency: number of clients of the closed loop whose throughput was the measure of the rate.
        load: at `UTILISATION` of that throughput.
    """

    concurrency: int
    load: LoadResult


def at_random_times(
    measure: Callable[[float], LoadResult], loads: dict[int, LoadResult], target: float
) -> Arrivals | None:
    """Find the highest load of a finalist that also keeps the target with requests at random times.

    A load is lowered only after two misses: other work on the machine may have caused one.

    Args:
        measure: measures requests at random times, given their rate in requests/s.
        loads: its measurements in closed loops, by concurrency.
        target: of the p99 latency, in seconds.

    Returns:
        the first load that kept the target, from the highest; otherwise the lowest; None if no closed loop kept it.
    """
    within = {concurrency: load.throughput for concurrency, load in loads.items() if meets(load, target)}
    found, last = None, inf
    for concurrency in sorted(within, key=within.__getitem__, reverse=True):
        if within[concurrency] > LOWER * last:
            continue
        last = within[concurrency]
        for _ in range(2):
            found = Arrivals(concurrency, measure(UTILISATION * last))
            if meets(found.load, target):
                return found
    return found


@dataclass(frozen=True)
class Verdict:
    """The decision of the final.

    Attributes:
        best: the finalist with the highest score.
        scores: the scores of all finalists, by the medians of their measurements.
        replaces: whether the best settings replace the current ones.
        reason: why, or why not.
    """

    best: Candidate
    scores: dict[Candidate, Score]
    replaces: bool
    reason: str


def decide(
    final: dict[Candidate, list[dict[int, LoadResult]]],
    steady: dict[Candidate, Arrivals],
    current: Candidate,
    target: float,
) -> Verdict:
    """Decide whether the best finalist replaces the current settings.

    Args:
        final: for each finalist, the measurements by concurrency, of each repeat.
        steady: for each finalist, the result of `at_random_times`. Clients that wait for their answers send at the same
            time and fill batches, which other clients do not. A finalist has the throughput of the load that kept the
            target here, and none if it missed the target.
        current: the current settings.
        target: of the p99 latency, in seconds.
    """
    closed = {candidate: score(medians(repeats), target) for candidate, repeats in final.items()}
    scores = dict(closed)
    for candidate, arrivals in steady.items():
        concurrency, load = arrivals.concurrency, arrivals.load
        if meets(load, target):
            scores[candidate] = score({concurrency: medians(final[candidate])[concurrency]}, target)
        else:
            scores[candidate] = Score(0.0, -load.p99 if not load.failed else -inf, concurrency)
    best = max(scores, key=scores.__getitem__)
    new, old = scores[best], scores.get(current)
    if best == current:
        return Verdict(best, scores, False, "The current settings are the best of those that were tried.")
    if old is not None and not old.throughput and new.throughput < closed[current].throughput:
        reason = (
            "The current settings miss the target with requests at random times, and the best others are slower: "
            f"{new.throughput:.0f} answers/s, where the current ones reach {closed[current].throughput:.0f} with "
            "clients that wait. Search longer, or on a machine without other load."
        )
        return Verdict(best, scores, False, reason)
    if old is None or not old.throughput:
        return Verdict(best, scores, new.throughput > 0, "The current settings miss the target.")
    gain = new.throughput / old.throughput - 1
    if gain < LEAST_GAIN:
        reason = f"The best settings are {gain:.1%} better. A change needs {LEAST_GAIN:.0%}."
        return Verdict(best, scores, False, reason)
    turns = [
        (of_best[new.concurrency].throughput, of_current[old.concurrency].throughput)
        for of_best, of_current in zip(final[best], final[current], strict=True)
        if new.concurrency in of_best and old.concurrency in of_current
    ]
    ahead = sum(of_best > of_current for of_best, of_current in turns)
    if ahead < len(turns):
        reason = f"The best settings are {gain:.1%} better by the median, but only in {ahead} of {len(turns)} turns."
        return Verdict(best, scores, False, f"{reason} Search longer, or on a machine without other load.")
    return Verdict(best, scores, True, f"{gain:.0%} more throughput within the target, and better in every turn.")


def medians(repeats: list[dict[int, LoadResult]]) -> dict[int, LoadResult]:
    """Return the medians of the repeats, for each concurrency that more than half of them measured."""
    loads: dict[int, list[LoadResult]] = {}
    for repeat in repeats:
        for concurrency, load in repeat.items():
            loads.setdefault(concurrency, []).append(load)
    return {concurrency: middle(found) for concurrency, found in sorted(loads.items()) if 2 * len(found) > len(repeats)}


def summary(points: Iterable[Point]) -> list[Point]:
    """Return one point for each candidate and concurrency: the median of the final, or the last measurement."""
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
    """Return the Pareto front, sorted by p99: no point without failures beats one in both throughput and p99."""
    front: list[Point] = []
    whole = [point for point in points if not point.load.failed and point.load.answered]
    for point in sorted(whole, key=lambda point: (point.load.p99, -point.load.throughput)):
        if not front or point.load.throughput > front[-1].load.throughput:
            front.append(point)
    return front
