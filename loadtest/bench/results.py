"""What the benchmark has measured, kept as JSON: the report is made of it, at any time."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.load.generator import LoadResult

OURS = "bundle"  # the system that the others are compared with
LIMIT = "in-process limit"
UTILISATION = 0.7  # of the best throughput just seen: the rate of an open loop
CONNECTIONS = 512  # of an open loop, at most: each is a thread of wrk's, and with more it hardly starts on two cores
TOLERANCE = 0.05  # by which the probability of the first class may differ from the reference's
TOLERATED = 0.01  # share of failed requests above which a system is nobody's best peer
LATENCIES = ("p50", "p95", "p99", "longest")


@dataclass(frozen=True)
class Measurement:
    """One run of the load generator.

    Attributes:
        clients: of a closed loop; None: it was an open one.
        rate: requests a second of an open loop; None: it was a closed one.
        rate_of: the system whose best throughput the rate is a share of.
        cpu_seconds: of the server's processes during the run.
        others: share of the machine's CPU that neither they nor the load generator used then.
        memory: their proportional set size right after it, in bytes.
    """

    case: str
    system: str
    round: int
    clients: int | None
    rate: float | None
    rate_of: str | None
    load: LoadResult
    cpu_seconds: float
    others: float
    memory: int

    @property
    def cpu_per_request(self) -> float:
        return self.cpu_seconds / self.load.answered if self.load.answered else math.inf


@dataclass(frozen=True)
class Answer:
    """What came first in a system's answer, and in the reference's: (class, probability)."""

    case: str
    system: str
    round: int
    seen: tuple[int, float]
    expected: tuple[int, float]

    @property
    def is_right(self) -> bool:
        return self.seen[0] == self.expected[0] and abs(self.seen[1] - self.expected[1]) <= TOLERANCE


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why. Without a case: the system could not be installed."""

    system: str
    case: str | None
    round: int | None
    message: str
    details: str = ""


@dataclass(frozen=True)
class Limit:
    """The most that a loop without a server does with one case.

    Attributes:
        rate: requests a second.
    """

    rate: float
    batch: int
    processes: int
    threads: int


@dataclass
class Results:
    """Attributes:
    about: machine, date and commit, in words.
    seconds: of each run of the load generator.
    warm_up: seconds of load before the first of them, for each system.
    versions: of every system that was asked for.
    limits: case -> "pipeline" or "handler" -> Limit.
    """

    about: dict[str, str]
    seconds: float
    warm_up: float
    versions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, dict[str, Limit]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def wrong_answers(self, case: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.case == case and not answer.is_right]

    def is_sound(self, case: str, system: str, seen: list[Measurement]) -> bool:
        """Whether one system's measurements count: it answers right, and failed few of these requests."""
        return few_failed([one.load for one in seen]) and all(
            answer.system != system for answer in self.wrong_answers(case)
        )

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(finite(asdict(self)), indent=1))

    @staticmethod
    def read(file: Path) -> "Results":
        """Raises:
        BundleError: there is none, or it is of another form.
        """
        if not file.is_file():
            raise BundleError(f"There are no results in {file}. Measure first: make bench")
        try:
            held = json.loads(file.read_text())
            held["limits"] = {
                case: {kind: Limit(**limit) for kind, limit in kinds.items()} for case, kinds in held["limits"].items()
            }
            held["answers"] = [
                Answer(**answer | {key: tuple(answer[key]) for key in ("seen", "expected")})
                for answer in held["answers"]
            ]
            held["measurements"] = [
                Measurement(**one | {"load": read_load(one["load"])}) for one in held["measurements"]
            ]
            held["failures"] = [Failure(**failure) for failure in held["failures"]]
            return Results(**held)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BundleError(f"{file} is not what this benchmark writes ({exc}). Measure again: make bench") from exc


def few_failed(loads: list[LoadResult]) -> bool:
    failed = sum(load.failed for load in loads)
    return failed <= TOLERATED * sum(load.answered + load.failed for load in loads)


def finite(value: object) -> object:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_load(held: dict) -> LoadResult:
    return LoadResult(**held | {name: math.inf for name in LATENCIES if held[name] is None})
