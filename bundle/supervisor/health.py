"""Observe every registered version through the management API, and what changes between observations."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import psutil
import requests

from bundle.server.client import Client
from bundle.server.http import SECONDS, session
from bundle.supervisor.state import Key, Registered, State

LOADED = re.compile(r'^WorkerLoadTime\{.*WorkerName="W-(\d+)-', re.MULTILINE)  # of TorchServe's metrics API


@dataclass(frozen=True)
class Version:
    """One registered version of a model.

    Attributes:
        workers: process id of each worker by its id; 0 for a worker without a process.
        ready: number of READY workers.
        loaded: number of workers that have been READY once, as far as is known.
        pending, capacity: number of queued requests; of those that the queue can hold.
    """

    registered: Registered
    workers: dict[str, int]
    ready: int
    pending: int
    capacity: int
    loaded: int = 0

    @property
    def key(self) -> Key:
        return self.registered.name, self.registered.version


def observe(client: Client, metrics: str) -> list[Version]:
    """Return every registered version.

    Args:
        metrics: base URL of TorchServe's metrics API.

    Raises:
        requests.RequestException: the management API does not answer.
    """
    found = []
    for name in client.models():
        default = (client.describe(name) or {}).get("modelVersion")
        found += [parse(described, default) for described in client.versions(name)]
    if all(version.ready >= version.registered.minimum for version in found):
        return found
    known = loaded_workers(metrics)
    return [replace(version, loaded=sum(worker in known for worker in version.workers)) for version in found]


def loaded_workers(metrics: str) -> set[str]:
    """Return the ids of all workers that have been READY once; an empty set if the metrics API does not answer."""
    try:
        return set(LOADED.findall(session.get(f"{metrics}/metrics", timeout=SECONDS).text))
    except requests.RequestException:
        return set()


def parse(described: dict, default: str | None) -> Version:
    """Return a version, given its description by the management API and its model's default version."""
    queue = described["jobQueueStatus"]
    ready = sum(worker["status"] == "READY" for worker in described["workers"])
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
        ready=ready,
        loaded=ready,
        pending=queue["pendingRequests"],
        capacity=queue["pendingRequests"] + queue["remainingCapacity"],
    )


@dataclass
class History:
    """Successive observations, and what follows from them.

    Attributes:
        latest: the last observation.
        expected_workers: for each version that ever had all its workers, its minimum at the last time it had them,
            perhaps between two observations. Workers added since are still starting, and not missed. A version without
            an entry never became ready: whoever registered it sees that, and it does not make the server unready.
        degraded_since: versions with fewer READY workers than expected, and since when (s, monotonic).
        restarts: for each version, how often a worker came back as another process.
        not_restored: versions whose saved registration, workers or default could not be restored.
    """

    latest: list[Version] = field(default_factory=list)
    expected_workers: dict[Key, int] = field(default_factory=dict)
    degraded_since: dict[Key, float] = field(default_factory=dict)
    restarts: Counter[Key] = field(default_factory=Counter)
    not_restored: list[Key] = field(default_factory=list)
    _pids: dict[tuple[Key, str], int] = field(default_factory=dict)

    def add(self, versions: list[Version], now: float) -> None:
        """Add an observation made at the time `now` (s, monotonic)."""
        self.latest = versions
        full = {v.key: v.registered.minimum for v in versions if max(v.ready, v.loaded) >= v.registered.minimum}
        expected = self.expected_workers
        self.expected_workers = {v.key: expected[v.key] for v in versions if v.key in expected} | full
        degraded = [v.key for v in versions if v.ready < min(v.registered.minimum, self.expected_workers.get(v.key, 0))]
        self.degraded_since = {key: self.degraded_since.get(key, now) for key in degraded}
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

    def state(self, archive_versions: dict[str, str], saved: State) -> State:
        """Return the registrations to keep.

        These are the versions that ever had all their workers, that were saved before, or that are in the store as
        NAME.mar.

        Args:
            archive_versions: the version of each NAME.mar.
            saved: what an earlier run has saved.
        """
        known = {*self.expected_workers, *archive_versions.items(), *(version.key for version in saved.registered)}
        there = {version.key for version in self.latest}
        removed = {name: version for name, version in archive_versions.items() if (name, version) not in there}
        return State([version.registered for version in self.latest if version.key in known], removed)
