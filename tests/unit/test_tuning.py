"""The search of `make tune`: which settings it tries, and which ones win."""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.load.generator import LoadResult
from bundle.server import frontend
from bundle.tuning import search
from bundle.tuning import tuner as tune
from bundle.tuning.search import Arrivals, Point, Score
from bundle.tuning.space import DELAYS, Candidate, distance, neighbours, space, spread

NOW = Candidate(1, 1, 16, 5)
TARGET = 0.1


def load(throughput: float, p99: float, p50: float | None = None, failed: int = 0) -> LoadResult:
    p50 = p99 / 2 if p50 is None else p50
    return LoadResult(1.0, int(throughput), failed, throughput, p50, p99, p99, p99)


# --- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000\n", 1.5), ("max 100000\n", os.cpu_count()), ("", os.cpu_count())]
)
def test_quota_is_the_containers_share_of_the_cores(tmp_path: Path, text: str, expected: float):
    (tmp_path / "cpu.max").write_text(text)
    assert tune.quota(tmp_path / "cpu.max") == expected
    assert tune.quota(tmp_path / "missing") == os.cpu_count()


# --- scores and climbs ----------------------------------------------------------------------------------------------


def test_score_is_the_best_throughput_within_the_target():
    loads = {1: load(50, 0.02), 4: load(150, 0.09), 16: load(400, 0.2), 64: load(500, 0.05, failed=1)}
    assert search.score(loads, TARGET) == Score(150, -0.09, 4)


def test_score_outside_the_target_ranks_by_distance_to_it():
    near = search.score({1: load(5, 0.3), 4: load(6, 0.9)}, TARGET)
    far = search.score({1: load(900, 0.4)}, TARGET)
    none = search.score({1: load(900, 0.01, failed=3)}, TARGET)
    assert near == Score(0, -0.3, 1)
    assert search.score({1: load(1, 0.1)}, TARGET) > near > far > none


def climbed(loads: dict[int, LoadResult], rungs: list[int]) -> list[int]:
    asked = []

    def measured(concurrency: int) -> LoadResult:
        asked.append(concurrency)
        return loads[concurrency]

    search.climb(measured, rungs, TARGET)
    return asked


def test_climb_ends_where_the_target_is_missed():
    loads = {1: load(50, 0.02), 4: load(150, 0.09), 16: load(400, 0.2), 64: load(500, 0.9)}
    assert climbed(loads, [1, 4, 16, 64]) == [1, 4, 16]


def test_climb_ends_where_requests_fail():
    assert climbed({1: load(50, 0.02), 4: load(150, 0.03, failed=1), 16: load(1, 1)}, [1, 4, 16]) == [1, 4]


def test_climb_ends_where_throughput_stops_rising():
    loads = {1: load(50, 0.01), 4: load(150, 0.02), 16: load(149, 0.03), 64: load(151, 0.04), 256: load(150, 0.05)}
    assert climbed(loads, [1, 4, 16, 64, 256]) == [1, 4, 16, 64]
    assert climbed(loads | {64: load(200, 0.04)}, [1, 4, 16, 64, 256]) == [1, 4, 16, 64, 256]


def test_climb_goes_on_after_a_few_late_answers():
    loads = {1: load(50, 0.3, p50=0.01), 4: load(150, 0.09), 16: load(1, 0.4)}
    assert climbed(loads, [1, 4, 16]) == [1, 4, 16]


def test_climb_that_starts_too_high_goes_down():
    loads = {8: load(150, 0.4), 4: load(150, 0.2), 2: load(100, 0.08), 1: load(1, 0.01)}
    assert climbed(loads, [8, 16]) == [8, 4, 2]


def test_later_climb_starts_below_the_best():
    assert search.rising(16) == [8, 16, 32, 64, 128, 256]
    assert search.rising(1) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert search.rising(256) == [128, 256]


# --- halving --------------------------------------------------------------------------------------------------------


def test_halving_finds_the_best_of_a_noisy_function():
    """Compare with the same time spent on all candidates equally. Noise falls with the root of a measurement's time."""
    field = spread(space(8, ["auto"], 64, 256, DELAYS), NOW, 32)

    def truth(candidate: Candidate) -> float:
        return 1000 - 60 * distance(candidate, Candidate(4, 2, 32, 2))

    best = max(field, key=truth)
    halved = equally = 0
    for seed in range(100):
        noise = random.Random(seed)

        def measured(some: Sequence[Candidate], seconds: float, noise=noise) -> dict[Candidate, Score]:
            return {each: Score(truth(each) + noise.gauss(0, 100 / math.sqrt(seconds)), 0, 1) for each in some}

        def judge(some, number, left, measured=measured):
            return measured(some, len(field) / len(some))

        halved += best in search.halve(field, judge)
        scores = measured(field, search.rounds(len(field)))
        equally += best in sorted(field, key=scores.__getitem__, reverse=True)[: search.FINALISTS]
    assert halved >= 90
    assert halved > equally


@given(st.integers(1, 100))
def test_halving_takes_the_planned_number_of_rounds(count: int):
    field = [Candidate(1, 1, size, 1) for size in range(1, count + 1)]
    asked = []

    def judge(some, number, left):
        asked.append((number, left))
        return {each: Score(each.batch_size, 0, 1) for each in some}

    finalists = search.halve(field, judge)
    assert finalists == field[::-1][: search.FINALISTS]
    planned = search.rounds(count)
    assert asked == [(number, planned + 2 - number) for number in range(1, planned + 1)]


def test_halving_finds_a_best_outside_its_sample_through_neighbours():
    everything = space(2, ["auto"], 64, 256, [1, 2])
    best = Candidate(2, 1, 64, 1)
    field = [each for each in spread(everything, NOW, 12) if each != best]

    def judge(some, number, left):
        return {each: Score(1000 - 60 * distance(each, best), 0, 1) for each in some}

    assert best not in field
    assert search.halve(field, judge, lambda leader: neighbours(everything, leader))[0] == best
    asked = []
    search.halve(field, lambda some, *_: asked.append(len(some)) or judge(some, 0, 0), lambda leader: everything)
    assert asked == [len(field), 6, 3]  # neighbours add no measurements


def test_halving_out_of_time_uses_what_was_measured():
    field = [Candidate(1, 1, size, 1) for size in range(1, 9)]

    def judge(some, number, left):
        return {} if number > 1 else {each: Score(each.batch_size, 0, 1) for each in some[:4]}

    assert [each.batch_size for each in search.halve(field, judge)] == [4, 3]


@given(budget=st.floats(1, 10_000), start=st.floats(0.1, 60), shortest=st.floats(0.5, 8))
def test_first_round_takes_no_more_than_its_share(budget: float, start: float, shortest: float):
    count = search.affordable(budget, start, shortest)
    each = start + search.EXPECTED_RUNGS * shortest
    assert count == 2 or count * each <= budget / (search.rounds(count) + 1)


class Machine:
    """Stands for the trial server: the nearer the settings are to `best`, the faster it answers."""

    server = SimpleNamespace(settings={"max_response_size": "16777216"})
    inputs = [None]

    def __init__(self, best: Candidate):
        self.best, self.served = best, []

    def lives(self) -> bool:
        return True

    @contextmanager
    def started(self, candidate: Candidate) -> Iterator[SimpleNamespace]:
        def answer(concurrency: int, seconds: float, timeout: float) -> LoadResult:
            return load((1000 - 60 * distance(candidate, self.best)) * min(1, concurrency / 64), 0.01)

        self.served.append(candidate)
        facts = {"candidate": candidate, "start_seconds": 0.1, "memory": 1, "precision": "float32", "answer_bytes": 99}
        yield SimpleNamespace(**facts, load=answer, random_arrivals=answer)


def test_tuning_tries_neighbours_of_its_leader(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "cores", lambda: 2)
    monkeypatch.setattr(tune, "on_gpu", lambda: False)
    best = Candidate(1, 2, 32, 1)
    machine = Machine(best)
    search_for = tune.Tuning(machine, NOW, ["auto"], True, TARGET, 90, lambda doing, score: None)
    first = search_for.field()
    assert best not in first
    verdict = search_for.run()
    assert verdict.replaces
    assert verdict.best == best
    assert set(machine.served) > set(first)


@pytest.mark.parametrize(("waits", "tried"), [(True, {1, 2}), (False, {NOW.delay})])
def test_tuning_tries_other_delays_only_where_batches_wait_to_fill(
    monkeypatch: pytest.MonkeyPatch, waits: bool, tried: set[int]
):
    monkeypatch.setattr(tune, "cores", lambda: 2)
    monkeypatch.setattr(tune, "on_gpu", lambda: False)
    search_for = tune.Tuning(Machine(NOW), NOW, ["auto"], waits, TARGET, 90, lambda doing, score: None)
    assert set(search_for.delays(lone=0.007)) == tried  # NOW waits 5 ms of the 7
    search_for.field()
    assert {candidate.delay for candidate in search_for.candidates} <= tried


@pytest.mark.parametrize(
    ("config", "off", "waits"),
    [
        ("", "", False),
        ("patience: fixed\n", "", True),
        ("", "lost gather", True),
        ("", "all", True),
        ("", "lost", False),
    ],
)
def test_batches_wait_to_fill_with_fixed_patience_or_without_the_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, off: str, waits: bool
):
    monkeypatch.setenv(frontend.OFF, off)
    (tmp_path / CONFIG_NAME).write_text(f"{config}bundle: {{version: '1.0', handler: mnist}}\n")
    assert tune.waits_to_fill(ModelFolder(tmp_path)) is waits


# --- the verdict ----------------------------------------------------------------------------------------------------


def final(mine: list[float], current: list[float], p99: float = 0.05) -> dict[Candidate, list[dict[int, LoadResult]]]:
    other = replace(NOW, batch_size=32)
    return {
        NOW: [{16: load(throughput, p99)} for throughput in current],
        other: [{16: load(throughput, 0.05)} for throughput in mine],
    }


def test_clearly_better_settings_replace_the_current_ones():
    verdict = search.decide(final([120, 121, 130], [100, 101, 99]), {}, NOW, TARGET)
    assert verdict.replaces
    assert verdict.best.batch_size == 32
    assert "21% more" in verdict.reason


@pytest.mark.parametrize(
    ("mine", "current", "reason"),
    [
        ([104, 104, 104], [100, 100, 100], "4.0% better. A change needs 5%"),
        ([120, 98, 121], [100, 101, 99], "only in 2 of 3 turns"),
        ([90, 98, 91], [100, 101, 99], "The current settings are the best"),
    ],
)
def test_current_settings_stay_unless_others_are_clearly_better(mine: list[float], current: list[float], reason: str):
    verdict = search.decide(final(mine, current), {}, NOW, TARGET)
    assert not verdict.replaces
    assert reason in verdict.reason


def test_current_settings_that_miss_the_target_are_replaced():
    verdict = search.decide(final([50, 50, 50], [400, 400, 400], p99=0.2), {}, NOW, TARGET)
    assert verdict.replaces
    assert "miss the target" in verdict.reason


def test_current_settings_stay_if_all_miss_the_target():
    missed = {candidate: [{1: load(9, 0.3)}] for candidate in (NOW, replace(NOW, batch_size=2))}
    verdict = search.decide(missed, {}, NOW, TARGET)
    assert not verdict.replaces
    assert not verdict.scores[verdict.best].throughput


def test_settings_with_one_failed_request_do_not_win():
    found = final([120, 121, 130], [100, 101, 99])
    found[replace(NOW, batch_size=32)][1][16] = load(121, 0.05, failed=1)
    assert search.decide(found, {}, NOW, TARGET).best == NOW


def test_settings_late_under_random_arrivals_do_not_win():
    found = final([120, 121, 130], [100, 101, 99])
    other = replace(NOW, batch_size=32)
    steady = {NOW: Arrivals(16, load(70, 0.05)), other: Arrivals(16, load(84, 0.05))}
    assert search.decide(found, steady, NOW, TARGET).best == other
    assert search.decide(found, steady | {other: Arrivals(16, load(84, 0.2))}, NOW, TARGET).best == NOW
    assert search.decide(found, steady | {other: Arrivals(16, load(84, 0.05, failed=1))}, NOW, TARGET).best == NOW


def test_settings_have_the_throughput_of_the_load_that_they_keep_under_random_arrivals():
    found = {NOW: [{16: load(60, 0.02), 64: load(100, 0.05)}] * 3}
    verdict = search.decide(found, {NOW: Arrivals(16, load(42, 0.05))}, NOW, TARGET)
    assert verdict.scores[NOW] == Score(60, -0.02, 16)


@pytest.mark.parametrize(("throughput", "replaces"), [(984, False), (10_067, True), (11_000, True)])
def test_settings_late_under_random_arrivals_are_not_replaced_by_slower_ones(throughput: float, replaces: bool):
    """One second of random arrivals once cost settings with 10,067 answers/s their place, for ones with 984."""
    found = final([throughput] * 3, [10_067] * 3)
    late = {NOW: Arrivals(16, load(6906, TARGET + 0.01)), replace(NOW, batch_size=32): Arrivals(16, load(700, 0.01))}
    verdict = search.decide(found, late, NOW, TARGET)
    assert verdict.replaces == replaces
    assert ("the best others are slower: 984 answers/s" in verdict.reason) != replaces


def at_random_times(p99: Callable[[float], float]) -> tuple[Arrivals | None, list[float]]:
    """Return the result of settings with these latencies (s) by rate, and the rates that were measured."""
    rates: list[float] = []

    def measure(rate: float) -> LoadResult:
        rates.append(rate)
        return load(rate, p99(rate))

    loads = {4: load(100, 0.01), 16: load(500, 0.02), 64: load(990, 0.03), 128: load(1000, 0.05), 256: load(1100, 0.2)}
    return search.at_random_times(measure, loads, TARGET), rates


def test_settings_late_under_random_arrivals_are_tried_at_a_lower_load():
    found, rates = at_random_times(lambda rate: 0.2 if rate > 400 else 0.05)
    assert rates == [700, 700, 350]  # not at 693: hardly lower
    assert found == Arrivals(16, load(350, 0.05))


def test_one_late_measurement_of_random_arrivals_does_not_lower_the_load():
    disturbed = iter([0.2, 0.05])
    found, rates = at_random_times(lambda rate: next(disturbed))
    assert rates == [700, 700]
    assert found == Arrivals(128, load(700, 0.05))


def test_settings_late_at_every_load_keep_the_lowest():
    found, rates = at_random_times(lambda rate: 0.2)
    assert rates == [700, 700, 350, 350, 70, 70]
    assert found == Arrivals(4, load(70, 0.2))


def test_settings_late_in_every_closed_loop_get_no_random_arrivals():
    assert search.at_random_times(lambda rate: load(rate, 0.01), {4: load(100, 0.2)}, TARGET) is None


def test_turn_that_ended_early_does_not_decide():
    found = final([90, 90, 90], [100, 100, 100])
    other = replace(NOW, batch_size=32)
    found[other] = [
        {8: load(60, 0.3)},
        {8: load(90, 0.05), 32: load(120, 0.05)},
        {8: load(90, 0.05), 32: load(121, 0.05)},
    ]
    verdict = search.decide(found, {}, NOW, TARGET)
    assert verdict.replaces
    assert verdict.scores[other].concurrency == 32


def test_one_disturbed_turn_does_not_change_the_verdict():
    verdict = search.decide(final([120, 120, 120], [100, 100, 100]), {}, NOW, TARGET)
    disturbed = final([120, 120, 120], [100, 100, 100])
    disturbed[replace(NOW, batch_size=32)][2][16] = load(118, 0.9)
    assert search.decide(disturbed, {}, NOW, TARGET).best == verdict.best


# --- the Pareto front -----------------------------------------------------------------------------------------------

measured_points = st.lists(
    st.builds(
        lambda throughput, p99, failed: Point(NOW, "round 1", 1, load(throughput, p99, failed=failed)),
        st.integers(0, 30),
        st.integers(1, 30),
        st.sampled_from([0, 0, 0, 1]),
    )
)


@given(measured_points)
def test_front_is_the_points_that_no_other_beats(points: list[Point]):
    front = search.front(points)
    whole = [point.load for point in points if point.load.answered and not point.load.failed]

    def beats(one: LoadResult, other: LoadResult) -> bool:
        as_good = one.throughput >= other.throughput and one.p99 <= other.p99
        return as_good and (one.throughput, one.p99) != (other.throughput, other.p99)

    unbeaten = {(each.throughput, each.p99) for each in whole if not any(beats(other, each) for other in whole)}
    shown = [(point.load.throughput, point.load.p99) for point in front]
    assert set(shown) == unbeaten
    assert len(shown) == len(unbeaten)
    assert shown == sorted(shown)


def test_summary_prefers_the_final():
    first = Point(NOW, "round 1", 4, load(500, 0.01))
    later = Point(NOW, "round 2", 16, load(300, 0.03))
    finals = [Point(NOW, search.FINAL, 4, load(throughput, 0.02)) for throughput in (90, 100, 200)]
    [four, sixteen] = search.summary([first, later, *finals])
    assert four.load.throughput == 100
    assert sixteen.load == later.load
