"""What a trial of a fault is: what it does to the stack, what must hold, and what was seen."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.docker.stack import Stack
from tests.trials.faults.traffic import Answer, longest_silence, p99, statuses


@dataclass
class Outcome:
    """What one trial saw.

    Attributes:
        answers: of every request that counts.
        recovery: seconds from the fault until full strength; None where nothing is lost that could come back.
        broken: the limits that did not hold.
        notes: what else was measured, in words.
    """

    answers: list[Answer]
    recovery: float | None = None
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self, holds: bool, limit: str) -> None:
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
        """Without an answer: the connection broke, or it took too long."""
        return sum(answer.status is None for answer in self.answers)

    @property
    def failed(self) -> int:
        """Answered, and neither right nor told to come again."""
        return len(self.answers) - self.answered - self.refused - self.lost

    def row(self) -> dict:
        """As the report has it."""
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
    """A fault.

    Attributes:
        name: for the command line.
        fault: what happens.
        holds: what must hold.
        run: does it to a healthy stack, and leaves it healthy; is told how many seconds a phase of load takes.
    """

    name: str
    fault: str
    holds: str
    run: Callable[[Stack, float], Outcome]
