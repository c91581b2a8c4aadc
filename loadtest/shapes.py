"""How many users there are at which second: steps, a spike, a soak, a constant arrival rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bundle import durations
from loadtest.errors import LoadTestError

MOST_USERS = 2000  # that are made for an arrival rate; whoever needs more says USERS
RAMP_SHARE, RAMP_SECONDS = 0.1, 60  # of a soak: a tenth of it, a minute at most


@dataclass(frozen=True)
class Load:
    """What was asked for.

    Attributes:
        shape: a key of SHAPES.
        users: at most so many at a time.
        seconds: how long it takes in all.
        rate: arrivals a second over all users, of the shape `rate`; None for the others.
        models: how many models are asked: no fewer users than that.
    """

    shape: str
    users: int
    seconds: int
    rate: float | None = None
    models: int = 1

    @property
    def period(self) -> float:
        """Seconds between two arrivals of one user."""
        return self.users / self.rate

    def users_at(self, seconds: float) -> int:
        """How many users there are so many seconds after the start."""
        return SHAPES[self.shape](self, seconds)

    def tick(self, seconds: float) -> tuple[int, float] | None:
        """What a LoadTestShape of locust says: users, and how many may come or go a second; None at the end."""
        if seconds >= self.seconds:
            return None
        return self.users_at(seconds), self.users  # whatever changes has changed within a second

    @classmethod
    def parse(cls, settings: Mapping[str, str], models: int = 1) -> "Load | None":
        """Out of SHAPE, USERS, DURATION and RATE; None without SHAPE, where locust's own options decide.

        Raises:
            LoadTestError: one of them is not what it must be.
        """
        shape = settings.get("SHAPE", "")
        if not shape:
            return None
        if shape not in SHAPES:
            raise LoadTestError(f"SHAPE is {shape!r}, and must be one of: {', '.join(SHAPES)}")
        rate = None
        if shape == "rate":
            rate = positive("RATE", settings.get("RATE", ""), float)
        users = settings.get("USERS", "") or str(enough_users(rate, models) if rate else 64)
        return cls(shape, positive("USERS", users, int), seconds(settings.get("DURATION", "") or "60s"), rate, models)


def positive(name: str, text: str, kind: type) -> float | int:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        whole = "a whole number" if kind is int else "a number"
        raise LoadTestError(f"{name} is {text!r}, and must be {whole} above 0")
    return number


def seconds(text: str) -> int:
    """Return the whole seconds of a duration.

    Raises:
        LoadTestError: it is not one, or shorter than a second.
    """
    try:
        duration = round(durations.seconds(text))
    except ValueError:
        duration = 0
    if not duration:
        raise LoadTestError(f"DURATION is {text!r}, and must be at least 1s, like 90s, 5m or 1h30m")
    return duration


def enough_users(rate: float, models: int) -> int:
    """So many that an arrival finds one free while answers take less than a second."""
    return max(models, min(MOST_USERS, math.ceil(rate)))


def levels(most: int, least: int) -> list[int]:
    """Doubling user counts that end at `most` and start at no fewer than `least`: 64, 4 -> 4, 8, 16, 32, 64."""
    found = [most]
    while found[0] // 2 >= max(1, least):
        found.insert(0, found[0] // 2)
    return found


def steps(load: Load, seconds: float) -> int:
    """Doubles the users until all are there, as long at each step: where throughput ends and latency begins."""
    steps = levels(load.users, load.models)
    return steps[min(len(steps) - 1, int(seconds / load.seconds * len(steps)))]


def spike(load: Load, seconds: float) -> int:
    """A tenth of the users; for a fifth of the time, in the middle, all of them; then a tenth again."""
    if 0.4 <= seconds / load.seconds < 0.6:
        return load.users
    return min(load.users, max(load.models, load.users // 10))


def soak(load: Load, seconds: float) -> int:
    """Ramps up, and stays: what leaks, fills or slows down shows after hours."""
    ramp = min(RAMP_SHARE * load.seconds, RAMP_SECONDS)
    return max(1, min(load.users, math.ceil(load.users * seconds / ramp)))


def rate(load: Load, seconds: float) -> int:
    """All users at once: the arrivals are theirs to keep (`arrivals.Schedule`)."""
    return load.users


SHAPES: dict[str, Callable[[Load, float], int]] = {"steps": steps, "spike": spike, "soak": soak, "rate": rate}
