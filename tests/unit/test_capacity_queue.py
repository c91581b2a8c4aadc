"""The simulated queue against known results."""

from dataclasses import replace
from math import exp, factorial, log

import numpy as np
import pytest

from bundle.capacity import queueing
from bundle.capacity.queueing import HIGHEST_LOAD, MOST_REPLICAS, Replica, latency

LONE = Replica(service=(0.010,), workers=1)  # one request at a time, 100/s
BATCHES = Replica(service=tuple(0.004 + 0.001 * size for size in range(1, 9)), workers=2)


EXACT = 200_000  # requests, for comparisons with known results
SHIPPED = queueing.REQUESTS


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queueing, "REQUESTS", 20_000)


def exponential(mean: float) -> tuple[float, ...]:
    """Deviations from the mean that make service times exponential."""
    quantiles = -mean * np.log(1 - (np.arange(5000) + 0.5) / 5000)
    return tuple(quantiles - quantiles.mean())


def waits_at_most(time: float, rate: float, service: float) -> float:
    """Return the probability that a request waits at most this long in an M/D/1 queue (Erlang 1909)."""
    terms = [
        (rate * (k * service - time)) ** k / factorial(k) * exp(-rate * (k * service - time))
        for k in range(int(time / service) + 1)
    ]
    return (1 - rate * service) * sum(terms)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.8])
def test_p99_of_constant_service_is_that_of_an_m_d_1_queue(load: float):
    seen = latency(LONE, 1, 100 * load, requests=EXACT)
    assert waits_at_most(seen.p99 - 0.010, 100 * load, 0.010) == pytest.approx(0.99, abs=0.002)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_percentiles_of_exponential_service_are_those_of_an_m_m_1_queue(load: float):
    seen = latency(replace(LONE, spread=exponential(0.010)), 1, 100 * load, requests=EXACT)
    assert seen.p99 == pytest.approx(log(100) / (100 - 100 * load), rel=0.06)
    assert seen.p50 == pytest.approx(log(2) / (100 - 100 * load), rel=0.03)


def test_worker_takes_all_that_waits():
    """A batch of any size takes 10 ms, and one follows another: a request waits for 0 to 10 ms, then 10 ms more."""
    seen = latency(Replica(service=(0.010,) * 1000, workers=1), 1, 20_000)
    assert (seen.p50, seen.p99) == pytest.approx((0.015, 0.0199), rel=0.01)


def test_transit_is_added_to_every_request():
    with_transit = latency(replace(LONE, transit=0.005), 1, 50)
    without = latency(LONE, 1, 50)
    assert (with_transit.p50, with_transit.p99) == pytest.approx((without.p50 + 0.005, without.p99 + 0.005))


def test_capacity_is_that_of_the_fastest_batch():
    assert LONE.capacity == pytest.approx(100)
    assert BATCHES.capacity == pytest.approx(2 * 8 / 0.012)
    assert Replica(service=(0.001, 0.004), workers=1).capacity == pytest.approx(1000)


def test_p99_rises_with_the_rate_and_falls_with_replicas():
    by_rate = [latency(BATCHES, 2, share * 2 * BATCHES.capacity).p99 for share in (0.2, 0.4, 0.6, 0.8, 0.95)]
    assert by_rate == sorted(by_rate)
    by_replicas = [latency(BATCHES, replicas, 2000).p99 for replicas in (2, 3, 4, 6)]
    assert by_replicas == sorted(by_replicas, reverse=True)


def test_replicas_with_the_fewest_requests_in_flight_get_the_next():
    """Turns without regard to what is in flight would give two thirds of the p99 of one alone."""
    replica = replace(LONE, spread=exponential(0.010))
    alone, together = (latency(replica, replicas, 70 * replicas).p99 for replicas in (1, 4))
    assert together < 0.5 * alone


def test_more_replicas_than_are_simulated_share_their_work_a_little_better(monkeypatch: pytest.MonkeyPatch):
    count = 2 * MOST_REPLICAS
    said = latency(BATCHES, count, 900 * count)
    monkeypatch.setattr(queueing, "MOST_REPLICAS", count)
    simulated = latency(BATCHES, count, 900 * count)
    assert simulated != said
    assert simulated.p99 == pytest.approx(said.p99, rel=0.05)
    assert simulated.p50 == pytest.approx(said.p50, rel=0.05)


def test_random_choice_leaves_each_replica_a_queue_of_its_own():
    """Each of 16 is an M/M/1 queue; fewest in flight is far better."""
    replica = replace(LONE, spread=exponential(0.010))
    chosen = latency(replica, 16, 16 * 50, "random", EXACT).p99
    least = latency(replica, 16, 16 * 50, "least", EXACT).p99
    assert chosen == pytest.approx(log(100) / (100 - 50), rel=0.06)
    assert least < 0.6 * chosen


@pytest.mark.parametrize("load", [0.7, HIGHEST_LOAD])
def test_p99_hardly_depends_on_the_seed(monkeypatch: pytest.MonkeyPatch, load: float):
    """At the shipped size and up to the highest load of a plan; no queue with batches varies as much as M/M/1."""
    monkeypatch.setattr(queueing, "REQUESTS", SHIPPED)
    for seed in range(1, 5):
        monkeypatch.setattr(queueing, "SEED", seed)
        seen = latency(replace(LONE, spread=exponential(0.010)), 1, 100 * load)
        assert seen.p99 == pytest.approx(log(100) / (100 - 100 * load), rel=0.1)
