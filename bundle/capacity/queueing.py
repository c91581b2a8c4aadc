"""Simulate replicas that answer requests in batches: the latencies at a rate, and the throughput of some clients.

There is no formula for the p99 of a queue whose server takes all that waits, up to a limit, and whose time depends on
how much it took. So the queue is simulated, event by event. Requests come at random times (a Poisson process), and each
goes to the replica with the fewest requests in flight, as nginx's `least_conn` sends them, or to any of them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

import numpy as np

REQUESTS = 100_000  # of a simulation: 1,000 of them are above the p99
LOAD = 0.7  # above it, more are simulated: long queues last, so that fewer of their latencies are independent
HIGHEST_LOAD = 0.8  # of a plan: above it, latencies depend on chance more than on the model
WARM_UP = 0.1  # share of them that finds the queues emptier than later ones do
SEED = 1  # of the random times: every number of replicas gets the same requests, so that only their number differs
LOOP, EACH = 2000, 10  # answers of a simulated closed loop: the least number of all, and of each client
MOST_REPLICAS = 16  # simulated; of more, each gets the same share, which is a little worse than what they do together

Balance = Literal["least", "random"]


@dataclass(frozen=True)
class Replica:
    """What one server needs for its requests.

    Attributes:
        service: seconds that a worker is busy with a batch, by its size: the first is that of a batch of one.
        workers: number of workers, which share one queue.
        transit: seconds of a request in which it occupies no worker.
        spread: seconds by which batches differ from `service`; all are equally likely, and their mean is 0.
    """

    service: tuple[float, ...]
    workers: int
    transit: float = 0.0
    spread: tuple[float, ...] = (0.0,)

    @property
    def capacity(self) -> float:
        """The highest rate that a replica can answer, in requests/s."""
        return max(self.workers * size / seconds for size, seconds in enumerate(self.service, 1))


@dataclass(frozen=True)
class Latency:
    """Percentiles of the latency, in seconds."""

    p50: float
    p99: float


def latency(
    replica: Replica, replicas: int, rate: float, balance: Balance = "least", requests: int | None = None
) -> Latency:
    """Return the latency of a number of replicas at a rate.

    Args:
        rate: requests/s, for all replicas together.
        balance: which replica gets a request: that with the fewest requests in flight, or a random one.
        requests: how many to simulate; by default, as many as the load needs.
    """
    # what a random choice leaves to each replica comes at random times, too: one replica is like all others
    simulated = 1 if balance == "random" else min(replicas, MOST_REPLICAS)
    requests = requests or enough_requests(rate / (replicas * replica.capacity))
    seconds = simulate(replica, simulated, rate * simulated / replicas, requests)
    p50, p99 = np.quantile(seconds[int(WARM_UP * requests) :], (0.50, 0.99))
    return Latency(float(p50), float(p99))


def enough_requests(load: float) -> int:
    """Return how many requests to simulate: the time in which a queue forgets grows with 1 / (1 - load)^2."""
    return round(REQUESTS * max(1.0, (1 - LOAD) / (1 - min(load, HIGHEST_LOAD))) ** 2)


def simulate(replica: Replica, replicas: int, rate: float, requests: int) -> np.ndarray:
    """Return the latency of each request, in seconds."""
    random = np.random.default_rng(SEED)
    arrivals: list[float] = np.cumsum(random.exponential(1 / rate, requests)).tolist()
    spread: list[float] = random.choice(replica.spread, requests).tolist()
    service, largest = replica.service, len(replica.service)
    waiting: list[deque[int]] = [deque() for _ in range(replicas)]
    idle, in_flight = [replica.workers] * replicas, [0] * replicas
    ends: list[tuple[float, int, list[int]]] = []  # when a batch ends, its replica, its requests
    done = [0.0] * requests
    started = 0

    def start(place: int, now: float) -> None:
        nonlocal started
        queue = waiting[place]
        batch = [queue.popleft() for _ in range(min(len(queue), largest))]
        heappush(ends, (now + max(0.0, service[len(batch) - 1] + spread[started]), place, batch))
        started += 1

    def end() -> None:
        now, place, batch = heappop(ends)
        for each in batch:
            done[each] = now
        in_flight[place] -= len(batch)
        if waiting[place]:
            start(place, now)
        else:
            idle[place] += 1

    turn = 0
    for request, now in enumerate(arrivals):
        while ends and ends[0][0] <= now:
            end()
        place = turn = least(in_flight, turn + 1)
        waiting[place].append(request)
        in_flight[place] += 1
        if idle[place]:
            idle[place] -= 1
            start(place, now)
    while ends:
        end()
    return np.asarray(done) - arrivals + replica.transit


def closed_loop(replica: Replica, clients: int) -> float:
    """Return the throughput (answers/s) of clients that send again `transit` seconds after their last answer."""
    service, largest, transit = replica.service, len(replica.service), replica.transit
    returns = deque((transit * client / clients, 1) for client in range(clients))  # when, and how many
    ends: list[tuple[float, int]] = []  # when a batch ends, its size
    waiting, idle, answered, now, counted, began = 0, replica.workers, 0, 0.0, 0, 0.0
    answers = max(LOOP, EACH * clients)
    while answered < answers:
        if returns and (not ends or returns[0][0] <= ends[0][0]):
            now, size = returns.popleft()
            waiting += size
        else:
            now, size = heappop(ends)
            answered, idle = answered + size, idle + 1
            returns.append((now + transit, size))
            if not counted and answered >= WARM_UP * answers:
                counted, began = answered, now
        # requests that arrive in the same moment are all there before a worker takes them
        while waiting and idle and not (returns and returns[0][0] <= now):
            size = min(waiting, largest)
            waiting, idle = waiting - size, idle - 1
            heappush(ends, (now + service[size - 1], size))
    return (answered - counted) / (now - began)


def least(numbers: Sequence[int], first: int) -> int:
    """Return the place of the smallest number; of equal ones, that of the next from `first` on, in turns."""
    smallest = min(numbers)
    try:
        return numbers.index(smallest, first)
    except ValueError:
        return numbers.index(smallest)
