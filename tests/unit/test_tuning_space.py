"""The settings that `make tune` may try."""

import random

from hypothesis import given
from hypothesis import strategies as st

from bundle.tuning.space import DELAYS, Candidate, delays_up_to, distance, neighbours, space, spread

NOW = Candidate(1, 1, 16, 5)


@given(
    cores=st.integers(1, 96),
    largest_batch=st.integers(1, 300),
    largest_load=st.integers(1, 256),
    delays=st.lists(st.integers(1, 100), min_size=1, unique=True),
)
def test_space_has_no_candidate_that_cannot_win(cores: int, largest_batch: int, largest_load: int, delays: list[int]):
    found = space(cores, ["auto"], largest_batch, largest_load, delays)
    assert len(set(found)) == len(found) > 0
    for candidate in found:
        assert candidate.workers * candidate.threads <= cores
        assert candidate.batch_size <= largest_batch
        if candidate.batch_size > 1:
            assert candidate.workers * candidate.batch_size <= largest_load
        assert candidate.delay in delays
    alone = [candidate for candidate in found if candidate.batch_size == 1]
    # a batch of one request is never delayed: one delay is enough
    assert len({(candidate.workers, candidate.threads) for candidate in alone}) == len(alone)
    assert {1, cores} <= {candidate.workers for candidate in alone}


def test_space_grows_with_precisions_and_has_one_thread_on_a_gpu():
    one = space(4, ["auto"], 64, 256, DELAYS)
    assert len(space(4, ["float32", "int8"], 64, 256, DELAYS)) == 2 * len(one)
    assert {candidate.threads for candidate in space(4, ["auto"], 64, 256, DELAYS, on_gpu=True)} == {1}


def test_sample_starts_with_the_current_settings_and_grows():
    everything = space(2, ["auto"], 64, 256, DELAYS)
    whole = spread(everything, NOW, 2 * len(everything))
    assert whole[0] == NOW
    assert len(set(whole)) == len(whole) == len({NOW, *everything})
    for count in (1, 2, 7, len(everything)):
        assert spread(everything, NOW, count) == whole[:count]


def test_sample_covers_the_space_better_than_chance():
    """The candidate farthest from the sample is nearer to it than to 95 % of random samples."""
    everything = space(8, ["auto"], 64, 256, DELAYS)

    def radius(sample: list[Candidate]) -> float:
        return max(min(distance(each, taken) for taken in sample) for each in everything)

    chance = random.Random(1)
    others = sorted(radius([NOW, *chance.sample(everything, 11)]) for _ in range(40))
    assert radius(spread(everything, NOW, 12)) <= others[2]


def test_sample_has_current_settings_from_outside_the_space():
    odd = Candidate(3, 5, 24, 100)
    assert spread(space(2, ["auto"], 64, 256, DELAYS), odd, 4)[0] == odd


def test_delays_of_a_fast_model_are_the_shortest_only():
    assert delays_up_to(0.0002) == [1]
    assert delays_up_to(0.005) == [1, 2, 5]


def test_neighbours_differ_by_one_step_of_batch_size_or_delay():
    everything = space(2, ["float32", "auto"], 64, 256, DELAYS)
    found = neighbours(everything, Candidate(2, 1, 16, 2))
    assert [(each.batch_size, each.delay) for each in found[:2]] == [(32, 2), (8, 2)]
    assert {(each.workers, each.threads, each.precision) for each in found} == {(2, 1, "auto")}
    assert {each.batch_size * each.delay for each in found} <= {8 * 2, 32 * 2, 16 * 1, 16 * 5, 16 * 2}
