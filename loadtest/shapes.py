"""Load shapes: the number of users over time. Steps, a spike, a soak, a constant arrival rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from bundle import durations
from loadtest.errors import LoadTestError

MOST_USERS = 2000  # the default number for an arrival rate is not above this; USERS may be
RAMP_SHARE, RAMP_SECONDS = 0.1, 60  # a soak ramps up during a tenth of the run, but at most a minute

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Load:
    """The load of a run.

    Attributes:
        shape: a key of SHAPES.
        users: maximum number of users at a time.
        seconds: length of the run.
        rate: requests a second of all users together, for the shape `rate`; None for other shapes.
        models: number of tested models, which is also the minimum number of users.
    """

    shape: str
    users: int
    seconds: int
    rate: float | None = None
    models: int = 1

    @property
    def period(self) -> float:
        """Seconds between two requests of one user, for the shape `rate`."""
        assert self.rate is not None
        return self.users / self.rate

    def users_at(self, seconds: float) -> int:
        """Return the number of users at this time after the start."""
        return SHAPES[self.shape](self, seconds)

    def tick(self, seconds: float) -> tuple[int, float] | None:
        """Return (users, users to start or stop a second) as locust's LoadTestShape does; None at the end."""
        if seconds >= self.seconds:
            return None
        return self.users_at(seconds), self.users  # every change takes at most a second

    @classmethod
    def parse(cls, settings: Mapping[str, str], models: int = 1) -> "Load | None":
        """Read SHAPE, USERS, DURATION and RATE.

        Returns:
            the load; None without SHAPE, because locust's own options apply then.

        Raises:
            LoadTestError: a setting is invalid.
        """
        shape = settings.get("SHAPE", "")
        if not shape:
            return None
        if shape not in SHAPES:
            raise LoadTestError(f"SHAPE is {shape!r}, and must be one of: {', '.join(SHAPES)}")
        rate = positive("RATE", settings.get("RATE", ""), float) if shape == "rate" else None
        users = settings.get("USERS", "") or str(enough_users(rate, models) if rate else 64)
        return cls(shape, positive("USERS", users, int), seconds(settings.get("DURATION", "") or "60s"), rate, models)


def positive(name: str, text: str, kind: type[Number]) -> Number:
    try:
        number = kind(text)
    except ValueError:
        number = kind(0)
    if not 0 < number < math.inf:
        whole = "a whole number" if kind is int else "a number"
        raise LoadTestError(f"{name} is {text!r}, and must be {whole} above 0")
    return number


def seconds(text: str) -> int:
    """Parse a duration and round it to whole seconds.

    Raises:
        LoadTestError: the text is not a duration, or the duration is shorter than a second.
    """
    try:
        duration = round(durations.seconds(text))
    except ValueError as exc:
        raise LoadTestError(f"DURATION is invalid: {str(exc).rstrip('.')}") from exc
    if not duration:
        raise LoadTestError(f"DURATION is {text!r}, and must be at least 1s")
    return duration


def enough_users(rate: float, models: int) -> int:
    """Return a number of users at which one is free for every request, if answers take less than a second."""
    return max(models, min(MOST_USERS, math.ceil(rate)))


def levels(most: int, least: int) -> list[int]:
    """Return doubling numbers of users up to `most`, none below `least`: 64, 4 -> 4, 8, 16, 32, 64."""
    doubling = [most]
    while doubling[0] // 2 >= max(1, least):
        doubling.insert(0, doubling[0] // 2)
    return doubling


def steps(load: Load, seconds: float) -> int:
    """Double the users in steps of equal length, to find where throughput stops growing and latency rises."""
    steps = levels(load.users, load.models)
    return steps[min(len(steps) - 1, int(seconds / load.seconds * len(steps)))]


def spike(load: Load, seconds: float) -> int:
    """Run with a tenth of the users, and with all of them for a fifth of the time, in the middle."""
    if 0.4 <= seconds / load.seconds < 0.6:
        return load.users
    return min(load.users, max(load.models, load.users // 10))


def soak(load: Load, seconds: float) -> int:
    """Ramp up and stay there: leaks and slowdowns show after hours."""
    ramp = min(RAMP_SHARE * load.seconds, RAMP_SECONDS)
    return max(1, min(load.users, math.ceil(load.users * seconds / ramp)))


def rate(load: Load, seconds: float) -> int:
    """Run with all users from the start; each keeps its own schedule (`arrivals.Schedule`)."""
    return load.users


SHAPES: dict[str, Callable[[Load, float], int]] = {"steps": steps, "spike": spike, "soak": soak, "rate": rate}
