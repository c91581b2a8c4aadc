"""Define a trial: the fault, the limits that must hold, and the outcome."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.docker.stack import Stack
from tests.trials.faults.traffic import Answer, longest_silence, p99, statuses


@dataclass
class Outcome:
    """The measurements of one trial.

    Attributes:
        answers: one per counted request.
        recovery: seconds from the fault until normal service; None if the fault does not interrupt it.
        broken: the limits that were not met.
        notes: other measurements, as text.
    """

    answers: list[Answer]
    recovery: float | None = None
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, holds: bool, limit: str) -> None:
        """Record the limit as broken unless it holds."""
        if not holds:
            self.broken.append(limit)

    @property
    def answered(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def refused(self) -> int:
        return sum(answer.refused for answer in self.answers)

    @property
    def lost(self) -> int:
        """The number of requests without an answer: the connection broke, or the request timed out."""
        return sum(answer.status is None for answer in self.answers)

    @property
    def failed(self) -> int:
        """The number of answers that are neither correct nor a rejection with Retry-After."""
        return len(self.answers) - self.answered - self.refused - self.lost

    def row(self) -> dict:
        """Return the figures for the report."""
        return {
            "sent": len(self.answers),
            "answered": self.answered,
            "refused": self.refused,
            "failed": self.failed,
            "lost": self.lost,
            "statuses": dict(statuses(self.answers)),
            "p99_seconds": round(p99([answer for answer in self.answers if answer.right]), 3),
            "silence_seconds": round(longest_silence(self.answers), 2),
            "recovery_seconds": None if self.recovery is None else round(self.recovery, 1),
            "broken": self.broken,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Trial:
    """A fault, and the function that injects it.

    Attributes:
        name: its name on the command line.
        fault: what happens, for the report.
        holds: the limits that must hold, for the report.
        run: injects the fault into a healthy stack and leaves the stack healthy. Its second argument is the length
            of a phase of load in seconds.
    """

    name: str
    fault: str
    holds: str
    run: Callable[[Stack, float], Outcome]
