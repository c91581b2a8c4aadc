"""What the management API says of every version at one moment, and what changed from moment to moment."""

from collections import Counter
from dataclasses import dataclass, field

import psutil

from bundle.server.client import Client
from bundle.supervisor.state import Registered, State

Key = tuple[str, str]  # a model's name and version


@dataclass(frozen=True)
class Version:
    """One registered version of a model.

    Attributes:
        workers: process id of each worker by its id; 0 for one that has none at the moment.
        ready: how many workers are READY.
        pending, capacity: requests that wait, and that may.
    """

    registered: Registered
    workers: dict[str, int]
    ready: int
    pending: int
    capacity: int

    @property
    def key(self) -> Key:
        return self.registered.name, self.registered.version


def observe(client: Client) -> list[Version]:
    """Raises:
    requests.RequestException: the management API does not answer."""
    found = []
    for name in client.models():
        default = (client.describe(name) or {}).get("modelVersion")
        found += [parse(described, default) for described in client.versions(name)]
    return found


def parse(described: dict, default: str | None) -> Version:
    queue = described["jobQueueStatus"]
    return Version(
        registered=Registered(
            name=described["modelName"],
            version=described["modelVersion"],
            url=described["modelUrl"],
            minimum=described["minWorkers"],
            maximum=described["maxWorkers"],
            default=described["modelVersion"] == default,
        ),
        workers={worker["id"]: worker["pid"] for worker in described["workers"]},
        ready=sum(worker["status"] == "READY" for worker in described["workers"]),
        pending=queue["pendingRequests"],
        capacity=queue["pendingRequests"] + queue["remainingCapacity"],
    )


@dataclass
class History:
    """Observations, one after the other.

    Attributes:
        latest: the last one.
        strength: of each version that ever had all its workers, how many it had to have when it last had them. More
            that are asked for since are being started, and are not missed. A version without an entry is a failed
            registration, which is its registrar's to see; it makes nothing else unready.
        weak_since: versions that have fewer READY workers than they had, and since when (s, monotonic).
        restarts: of each version, how often a worker came back as another process.
    """

    latest: list[Version] = field(default_factory=list)
    strength: dict[Key, int] = field(default_factory=dict)
    weak_since: dict[Key, float] = field(default_factory=dict)
    restarts: Counter[Key] = field(default_factory=Counter)
    _pids: dict[tuple[Key, str], int] = field(default_factory=dict)

    def add(self, versions: list[Version], now: float) -> None:
        self.latest = versions
        full = {v.key: v.registered.minimum for v in versions if v.ready >= v.registered.minimum}
        self.strength = {v.key: self.strength[v.key] for v in versions if v.key in self.strength} | full
        weak = [v.key for v in versions if v.ready < min(v.registered.minimum, self.strength.get(v.key, 0))]
        self.weak_since = {key: self.weak_since.get(key, now) for key in weak}
        for version in versions:
            self.restarts[version.key] += self._restarted(version)

    def _restarted(self, version: Version) -> int:
        count = 0
        for worker, pid in version.workers.items():
            before = self._pids.get((version.key, worker), 0)
            if psutil.pid_exists(pid) and pid > 0:
                count += before not in (0, pid)
                self._pids[version.key, worker] = pid
        return count

    def state(self, offered: dict[str, str], earlier: State | None) -> State:
        """What is worth restoring: what has had its workers now, or in an earlier run, or is there anyway.

        Args:
            offered: the version that each NAME.mar of the store has.
            earlier: what was restored.
        """
        known = {*self.strength, *offered.items(), *(version.key for version in (earlier or State()).registered)}
        there = {version.key for version in self.latest}
        removed = {name: version for name, version in offered.items() if (name, version) not in there}
        return State([version.registered for version in self.latest if version.key in known], removed)
