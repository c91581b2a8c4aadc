"""The results of the benchmark, kept as JSON. The report is generated from them, at any time."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.load.generator import LoadResult

OURS = "bundle"  # the system that is compared with its peers
FLOOR = "floor"  # the same server with a handler that returns a constant; not a peer
LIMIT = "in-process limit"
UTILISATION = 0.7  # rate of an open loop, as a share of the best throughput just measured
WINDOWS, FEWEST = 10, 3  # of a warm-up: the most windows, and the fewest
FLAT = 0.05  # difference between the rates of two windows, below which a system is warm
CONNECTIONS = 1024  # maximum for an open loop; further requests wait in the load generator
TOLERANCE = 0.05  # largest difference between the first class's probability and the reference's
TOLERATED = 0.01  # largest share of failed requests of a best peer
LATENCIES = ("p50", "p95", "p99", "longest")


@dataclass(frozen=True)
class Measurement:
    """One run of the load generator.

    Attributes:
        clients: number of clients of a closed loop; None for an open loop.
        rate: requests a second of an open loop; None for a closed loop.
        rate_of: the system whose best throughput the rate is a share of; None for a closed loop.
        cpu_seconds: CPU time of the server's processes during the run.
        others: share of the machine's CPU that neither the server nor the load generator used during the run.
        memory: proportional set size of the server's processes right after the run, in bytes.
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
class WarmUp:
    """The load that a system got before anything was measured.

    Attributes:
        seconds: how long it took.
        is_flat: whether the rate no longer changed at its end.
    """

    case: str
    system: str
    round: int
    seconds: float
    is_flat: bool


@dataclass(frozen=True)
class ComparedAnswer:
    """The first class and its probability in a system's answer, and in that of the reference."""

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
    """A failed measurement. `case` is None if the system could not be installed."""

    system: str
    case: str | None
    round: int | None
    message: str
    details: str = ""


@dataclass(frozen=True)
class Limit:
    """The highest rate of a loop without a server for one case.

    Attributes:
        rate: requests a second.
        batch: requests in a batch.
        processes: number of processes that run the loop.
        threads: torch threads of each process.
    """

    rate: float
    batch: int
    processes: int
    threads: int


@dataclass
class Results:
    """The results of a run of the benchmark.

    Attributes:
        about: machine, date and commit, as text.
        seconds: length of each run of the load generator.
        warm_up: longest time of load before the first of these, in seconds.
        versions: version of every measured system.
        limits: case -> "pipeline" or "handler" -> Limit.
    """

    about: dict[str, str]
    seconds: float
    warm_up: float
    versions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, dict[str, Limit]] = field(default_factory=dict)
    answers: list[ComparedAnswer] = field(default_factory=list)
    warm_ups: list[WarmUp] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def check_continues(self, about: dict[str, str], seconds: float, warm_up: float) -> None:
        """Check that a run with these settings can be added to these results.

        Raises:
            BundleError: the commit, the machine, the versions or a setting is another one.
        """
        before = {**self.about, "seconds": f"{self.seconds:g}", "warm-up": f"{self.warm_up:g}"}
        now = {**about, "seconds": f"{seconds:g}", "warm-up": f"{warm_up:g}"}
        for name, value in now.items():
            if name != "date" and before.get(name) != value:
                raise BundleError(
                    f"The results so far have another {name}: {before.get(name)}, now {value}. "
                    "Restore it, or measure everything again without --resume."
                )

    def keep(self, is_kept: Callable[[str | None, str, int | None], bool]) -> None:
        """Drop everything else of a case, a system and a round."""
        self.answers = [one for one in self.answers if is_kept(one.case, one.system, one.round)]
        self.warm_ups = [one for one in self.warm_ups if is_kept(one.case, one.system, one.round)]
        self.measurements = [one for one in self.measurements if is_kept(one.case, one.system, one.round)]
        self.failures = [one for one in self.failures if is_kept(one.case, one.system, one.round)]

    def wrong_answers(self, case: str) -> list[ComparedAnswer]:
        return [answer for answer in self.answers if answer.case == case and not answer.is_right]

    def is_sound(self, case: str, system: str, seen: list[Measurement]) -> bool:
        """Return whether the measurements of a system count: its answers are right, and few requests failed."""
        return few_failed([one.load for one in seen]) and all(
            answer.system != system for answer in self.wrong_answers(case)
        )

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(finite(asdict(self)), indent=1))

    @staticmethod
    def read(file: Path) -> "Results":
        """Read the results of an earlier run.

        Raises:
            BundleError: the file is missing, or not a file of results.
        """
        if not file.is_file():
            raise BundleError(f"{file} is missing: there are no results yet. Measure first: make bench")
        try:
            content = json.loads(file.read_text())
            content["limits"] = {
                case: {kind: Limit(**limit) for kind, limit in kinds.items()}
                for case, kinds in content["limits"].items()
            }
            content["answers"] = [
                ComparedAnswer(**answer | {key: tuple(answer[key]) for key in ("seen", "expected")})
                for answer in content["answers"]
            ]
            content["warm_ups"] = [WarmUp(**one) for one in content["warm_ups"]]
            content["measurements"] = [
                Measurement(**one | {"load": read_load(one["load"])}) for one in content["measurements"]
            ]
            content["failures"] = [Failure(**failure) for failure in content["failures"]]
            return Results(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BundleError(
                f"{file} is not a results file of this version ({exc}). Measure again: make bench"
            ) from exc


def is_peer(system: str) -> bool:
    return system not in (OURS, FLOOR)


def few_failed(loads: list[LoadResult]) -> bool:
    failed = sum(load.failed for load in loads)
    return failed <= TOLERATED * sum(load.answered + load.failed for load in loads)


def finite(value: object) -> object:
    """Replace infinity and NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_load(content: dict) -> LoadResult:
    return LoadResult(**content | {name: math.inf for name in LATENCIES if content[name] is None})
