"""Simulate replicas that answer requests in batches: the latencies at a rate.

There is no formula for the p99 of a queue whose server takes all that waits, up to a limit, and whose time depends on
how much it took. So the queue is simulated, event by event. Requests come at random times (a Poisson process), and each
goes to the replica with the fewest requests in flight, as nginx's `least_conn` sends them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

REQUESTS = 100_000  # of a simulation: 1,000 of them are above the p99
WARM_UP = 0.1  # share of them that finds the queues emptier than later ones do
SEED = 1  # the same requests for every number of replicas, so that they can be compared
MOST_REPLICAS = 16  # simulated; of more, each gets the same share, which is a little worse than what they do together


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


def latency(replica: Replica, replicas: int, rate: float, requests: int | None = None) -> Latency:
    """Return the latency of a number of replicas at a rate.

    Args:
        rate: requests/s, for all replicas together.
        requests: how many to simulate; by default, `REQUESTS`.
    """
    requests = requests or REQUESTS
    simulated = min(replicas, MOST_REPLICAS)
    seconds = simulate(replica, simulated, rate * simulated / replicas, requests)
    p50, p99 = np.quantile(seconds[int(WARM_UP * requests) :], (0.50, 0.99))
    return Latency(float(p50), float(p99))


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


def least(numbers: Sequence[int], first: int) -> int:
    """Return the place of the smallest number; of equal ones, that of the next from `first` on, in turns."""
    smallest = min(numbers)
    try:
        return numbers.index(smallest, first)
    except ValueError:
        return numbers.index(smallest)
