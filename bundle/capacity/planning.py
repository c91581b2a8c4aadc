"""How many replicas a rate needs, so that the p99 latency keeps a target, also when some of them are missing."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bundle.capacity.queueing import Latency, Replica, latency
from bundle.errors import BundleError
from bundle.tuning.search import UTILISATION

MOST_MISSING = 0.9  # load of the replicas that are left: above it, latencies depend on chance more than on the model
IDLE = 0.01  # load at which hardly any request waits for another


@dataclass(frozen=True)
class Plan:
    """A number of replicas that is enough.

    Attributes:
        rate: requests/s, for all replicas together.
        target: of the p99 latency, in seconds.
        spare: how many replicas may be missing.
        replicas: how many there are, the spare ones included.
        load: share of their capacity that the rate takes.
        whole: the latency with all of them.
        load_left, left: with `spare` of them missing.
    """

    rate: float
    target: float
    spare: int
    replicas: int
    load: float
    whole: Latency
    load_left: float
    left: Latency


def plan(replica: Replica, rate: float, target: float, spare: int) -> Plan:
    """Return the smallest number of replicas that is enough.

    With all replicas, the load is at most `UTILISATION` of their capacity, and at most `MOST_MISSING` with `spare` of
    them missing. Both keep the target.

    Raises:
        BundleError: no number of replicas keeps the target, because a request alone takes too long.
    """
    alone = latency(replica, 1, IDLE * replica.capacity)
    if alone.p99 > target:
        raise BundleError(
            f"No number of replicas keeps a p99 of {1000 * target:g} ms: a request that waits for no other takes "
            f"{1000 * alone.p50:.3g} ms (p50) to {1000 * alone.p99:.3g} ms (p99). Make the model faster (make tune), "
            "use faster cores, or choose a longer target."
        )

    # so many replicas are as fast as one alone, but for the chance of a simulation
    idle = rate / (IDLE * replica.capacity)

    def enough(left: int) -> bool:
        return left >= idle or latency(replica, left, rate).p99 <= target

    # what is left must keep the target; then all together do, too, because each has less to do
    least = max(
        1, ceil(rate / (MOST_MISSING * replica.capacity)), ceil(rate / (UTILISATION * replica.capacity)) - spare
    )
    replicas = smallest(enough, least) + spare
    return Plan(
        rate,
        target,
        spare,
        replicas,
        rate / (replicas * replica.capacity),
        latency(replica, replicas, rate),
        rate / ((replicas - spare) * replica.capacity),
        latency(replica, replicas - spare, rate),
    )


def smallest(enough: Callable[[int], bool], least: int) -> int:
    """Return the smallest number from `least` on that is enough; a larger one is enough, too."""
    step, below = 1, least - 1
    while not enough(below + step):
        below += step
        step *= 2
    above = below + step
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above


def highest_rate(replica: Replica, replicas: int, target: float) -> float:
    """Return the highest rate at which replicas keep the target, in requests/s; 0 if there is none."""
    low, high = 0.0, replicas * replica.capacity
    while high - low > 0.005 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if latency(replica, replicas, middle).p99 <= target else (low, middle)
        if high < IDLE * replicas * replica.capacity:
            return 0.0
    return low
