"""The record of a run: the answers of each model in each time window, from all processes.

Locust rounds response times, and keeps percentiles of the whole run only. The chart needs percentiles of each step, and
rounding must not make a run miss a threshold.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

GROWTH = 1.01  # ratio of two neighbouring bins of response times: percentiles are up to 1 % too low, never too high
SETTLE_SECONDS = 1.0  # left out after the number of users has changed


@dataclass
class Tally:
    """The counted answers of one model.

    Attributes:
        times: right answers by bin of their response time; bin k begins at GROWTH**k ms.
        faults: failed requests by kind.
        wrong: number of failed requests with status 200.
    """

    times: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: int = 0

    @property
    def right(self) -> int:
        return self.times.total()

    @property
    def failed(self) -> int:
        return self.faults.total()

    @property
    def requests(self) -> int:
        return self.right + self.failed

    def share(self, count: int) -> float:
        return count / self.requests if self.requests else 0.0

    def add(self, milliseconds: float, fault: str | None = None, wrong: bool = False) -> None:
        if fault is None:
            self.times[math.floor(math.log(max(milliseconds, 0.01), GROWTH))] += 1
        else:
            self.faults[fault] += 1
            self.wrong += wrong

    def merge(self, other: "Tally") -> None:
        self.times.update(other.times)
        self.faults.update(other.faults)
        self.wrong += other.wrong

    def percentile(self, share: float) -> float | None:
        """Return the response time in ms that this share of the right answers did not exceed.

        It is rounded down to the beginning of its bin, and None if there are no right answers.
        """
        rank, seen = math.ceil(share * self.right), 0
        for time in sorted(self.times):
            seen += self.times[time]
            if seen >= rank:
                return GROWTH**time
        return None


def total(tallies: Iterable[Tally]) -> Tally:
    summed = Tally()
    for tally in tallies:
        summed.merge(tally)
    return summed


@dataclass(frozen=True)
class Point:
    """One model in a part of a run with a constant number of users.

    Attributes:
        users: number of users of all models together.
        seconds: length of the part.
    """

    users: int
    seconds: float
    tally: Tally

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.tally.right / self.seconds


def cut(windows: range, parts: int) -> list[range]:
    length = math.ceil(len(windows) / parts)
    return [windows[i : i + length] for i in range(0, len(windows), length)]


class Record:
    """The answers of a run by time window.

    Args:
        width: length of a window in seconds.

    Attributes:
        tallies: by window and model; a window is the number of widths since the epoch.
        users: (time, number of users) for every change of the number of users.
        started, stopped: seconds since the epoch.
    """

    def __init__(self, width: float = 1):
        self.width = width
        self.clear()

    def clear(self) -> None:
        self.tallies: dict[tuple[int, str], Tally] = {}
        self.users: list[tuple[float, int]] = []
        self.started: float | None = None
        self.stopped: float | None = None

    def start(self, now: float) -> None:
        self.clear()
        self.started = now

    def seconds(self, now: float) -> float:
        """Return how long the run took, or has taken so far."""
        return (self.stopped or now) - self.started if self.started else 0.0

    def add(self, now: float, model: str, milliseconds: float, fault: str | None = None, wrong: bool = False) -> None:
        self._tally(int(now // self.width), model).add(milliseconds, fault, wrong)

    def _tally(self, window: int, model: str) -> Tally:
        return self.tallies.setdefault((window, model), Tally())

    def note_users(self, now: float, users: int) -> None:
        if not self.users or self.users[-1][1] != users:
            self.users.append((now, users))

    def of(self, model: str, windows: Iterable[int] | None = None) -> Tally:
        """Return the answers of one model, of the whole run or of some windows."""
        if windows is None:
            return total(tally for (_, name), tally in self.tallies.items() if name == model)
        return total(self.tallies[window, model] for window in windows if (window, model) in self.tallies)

    def packed(self) -> list[list]:
        """Return the tallies as lists, which JSON and locust's messages can carry."""
        return [
            [window, model, list(tally.times.items()), list(tally.faults.items()), tally.wrong]
            for (window, model), tally in self.tallies.items()
        ]

    def unpack(self, rows: list[list]) -> None:
        """Add the packed tallies of another record."""
        for window, model, times, faults, wrong in rows:
            other = Tally(Counter(dict(times)), Counter(dict(faults)), wrong)
            self._tally(window, model).merge(other)

    def drain(self) -> list[list]:
        """Return the packed tallies and clear them."""
        rows = self.packed()
        self.tallies = {}
        return rows

    def save(self, file: Path) -> None:
        content = {"width": self.width, "started": self.started, "stopped": self.stopped, "users": self.users}
        file.write_text(json.dumps(content | {"tallies": self.packed()}))

    @classmethod
    def load(cls, file: Path) -> "Record":
        content = json.loads(file.read_text())
        record = cls(content["width"])
        record.started, record.stopped = content["started"], content["stopped"]
        record.users = [(time, users) for time, users in content["users"]]
        record.unpack(content["tallies"])
        return record

    def stretches(self, parts: int = 12) -> list[tuple[int, range]]:
        """Return the parts of the run with a constant number of users: (users, windows).

        The first second of each part is left out. A part that takes most of the run (a constant load, a soak after its
        ramp) is cut into `parts`.
        """
        changes = [*self.users, (self.stopped or self.started or 0.0, 0)]
        found = []
        for (begin, users), (end, _) in zip(changes, changes[1:], strict=False):
            windows = range(math.ceil((begin + SETTLE_SECONDS) / self.width), math.floor(end / self.width))
            if users and windows:
                found.append((users, windows))
        most = 0.7 * sum(len(windows) for _, windows in found)
        return [(users, part) for users, windows in found for part in cut(windows, parts if len(windows) > most else 1)]

    def points(self, model: str) -> list[Point]:
        """Return one model's point for each stretch, in the order of time."""
        return [Point(users, len(windows) * self.width, self.of(model, windows)) for users, windows in self.stretches()]
