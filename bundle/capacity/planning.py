"""How many replicas a rate needs, so that the p99 latency keeps a target, also when some of them are missing."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bundle.capacity.queueing import HIGHEST_LOAD, Balance, Latency, Replica, latency
from bundle.errors import BundleError
from bundle.tuning.search import UTILISATION

IDLE = 0.01  # load at which hardly any request waits for another


@dataclass(frozen=True)
class Plan:
    """A number of replicas that is enough.

    Attributes:
        rate: requests/s, for all replicas together.
        target: of the p99 latency, in seconds.
        spare: how many replicas may be missing.
        balance: which replica gets a request.
        replicas: how many there are, the spare ones included.
        capacity: the highest rate that one of them can answer.
        whole: the latency with all of them.
        left: the latency with `spare` of them missing.
    """

    rate: float
    target: float
    spare: int
    balance: Balance
    replicas: int
    capacity: float
    whole: Latency
    left: Latency

    @property
    def load(self) -> float:
        """Share of the capacity of all replicas that the rate takes."""
        return self.rate / (self.replicas * self.capacity)

    @property
    def load_left(self) -> float:
        """Share of the capacity of those that are left."""
        return self.rate / ((self.replicas - self.spare) * self.capacity)


def plan(replica: Replica, rate: float, target: float, spare: int, balance: Balance = "least") -> Plan:
    """Return the smallest number of replicas that is enough.

    With all replicas, the load is at most `UTILISATION` of their capacity, and at most `HIGHEST_LOAD` with `spare` of
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

    # With this many replicas, requests do not wait for each other, and more replicas change nothing. The search ends
    # here, even if chance puts a simulated p99 just above the target.
    idle = rate / (IDLE * replica.capacity)

    def enough(left: int) -> bool:
        return left >= idle or latency(replica, left, rate, balance).p99 <= target

    # what is left must keep the target; then all together do, too, because each has less to do
    busy = rate / replica.capacity
    left = smallest(enough, max(1, ceil(busy / HIGHEST_LOAD), ceil(busy / UTILISATION) - spare))
    whole = latency(replica, left + spare, rate, balance)
    missing = latency(replica, left, rate, balance)
    return Plan(rate, target, spare, balance, left + spare, replica.capacity, whole, missing)


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
