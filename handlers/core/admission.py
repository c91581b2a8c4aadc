"""Reject requests that waited too long, and those that the batch has no time left for."""

import time
from dataclasses import dataclass

from handlers.core.errors import Overloaded


@dataclass(frozen=True)
class Deadline:
    """The time after which a batch decodes, runs or explains no further input.

    The limits of a handler bound the time that one input takes. This bounds the time of a batch, which may hold
    hundreds of inputs that are just within those limits.

    Attributes:
        at: time.monotonic() seconds.
        work: what took too long, for the error message: "Decoding".
    """

    at: float
    work: str

    @classmethod
    def after(cls, seconds: float, work: str) -> "Deadline":
        return cls(time.monotonic() + seconds, work)

    def later(self, seconds: float) -> "Deadline":
        return Deadline(self.at + seconds, self.work)

    def check(self) -> None:
        """Raise Overloaded once the deadline has passed."""
        if time.monotonic() > self.at:
            other = ", or choose another method, or fewer steps or samples" if self.work == "Explaining" else ""
            raise Overloaded(f"{self.work} this batch took too long. Retry, or send fewer inputs per request{other}.")


def check_wait(arrival: float | None, longest: float | None) -> None:
    """Reject a request that waited too long: work on late requests delays the others, until all are late.

    Args:
        arrival: when the request reached the proxy (s since the epoch); None if it is unknown or does not matter.
        longest: the longest wait in seconds; None for no limit.

    Raises:
        Overloaded: the request waited longer.
    """
    if longest is not None and arrival is not None and time.time() - arrival > longest:
        raise Overloaded(
            f"The model is overloaded: this request waited {longest:g} s and was not started. Retry after the time in "
            "the Retry-After header."
        )
