"""What a run must hold: the limits of thresholds.yaml, and whether they were met."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from loadtest.errors import LoadTestError
from loadtest.record import Tally

FILE = Path(__file__).resolve().parent / "thresholds.yaml"


@dataclass(frozen=True)
class Limits:
    """Of one model; None is not checked. What each means is said in thresholds.yaml."""

    p99_ms: float | None = None
    failures: float | None = None
    wrong: float | None = None
    throughput: float | None = None
    arrivals: float | None = None


KEYS = [field.name for field in fields(Limits)]
SHARES = ("failures", "wrong", "arrivals")


@dataclass(frozen=True)
class Thresholds:
    defaults: Limits
    models: dict[str, Limits]

    def of(self, model: str) -> Limits:
        return self.models.get(model, self.defaults)


@dataclass(frozen=True)
class Outcome:
    """What one model did in a run.

    Attributes:
        seconds: how long the run took.
        asked: requests that an arrival rate would have made in that time; None for other shapes.
    """

    model: str
    tally: Tally
    seconds: float
    asked: float | None = None

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.tally.right / self.seconds if self.seconds else 0.0


def read(file: Path, models: set[str]) -> Thresholds:
    """A file of thresholds.

    Args:
        models: the names that it may have.

    Raises:
        LoadTestError: it cannot be read, or says what there is not.
    """
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except OSError as exc:
        raise LoadTestError(f"{file} cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise LoadTestError(f"{file} is not valid YAML: {exc}") from exc
    content = mapping(content, f"{file}")
    if unknown := content.keys() - {"defaults", "models"}:
        raise LoadTestError(f"{file}: there is no {unknown.pop()!r}; there are defaults and models")
    defaults = limits(content.get("defaults"), f"{file}, defaults")
    own = mapping(content.get("models"), f"{file}, models")
    if unknown := own.keys() - models:
        raise LoadTestError(f"{file}: there is no model {unknown.pop()!r}; there are: {', '.join(models)}")
    return Thresholds(
        Limits(**defaults), {name: Limits(**defaults | limits(of, f"{file}, {name}")) for name, of in own.items()}
    )


def mapping(content: object, place: str) -> dict:
    if not isinstance(content, dict | None):
        raise LoadTestError(f"{place}: {content!r} is no mapping")
    return content or {}


def limits(content: object, place: str) -> dict[str, float | None]:
    section = mapping(content, place)
    for key, value in section.items():
        if key not in KEYS:
            raise LoadTestError(f"{place}: there is no threshold {key!r}; there are: {', '.join(KEYS)}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise LoadTestError(f"{place}: {key} is {value!r}, and must be a number of at least 0")
        if key in SHARES and value > 1:
            raise LoadTestError(f"{place}: {key} is {value}, and must be a share from 0 to 1")
    return section


def misses(outcome: Outcome, limits: Limits) -> list[str]:
    """The thresholds that were not met, each as a sentence; nothing when all were."""
    tally = outcome.tally
    if not tally.right:
        return ["not one right answer"]
    found = []
    p99 = tally.percentile(0.99)
    if limits.p99_ms is not None and p99 > limits.p99_ms:
        found.append(f"p99 was {p99:.0f} ms, and must be at most {limits.p99_ms:g} ms")
    if limits.failures is not None and tally.share(tally.failed) > limits.failures:
        found.append(f"{tally.share(tally.failed):.2%} failed, and at most {limits.failures:.2%} may")
    if limits.wrong is not None and tally.share(tally.wrong) > limits.wrong:
        found.append(f"{tally.share(tally.wrong):.2%} were answered wrongly, and at most {limits.wrong:.2%} may be")
    floor = throughput_floor(outcome, limits)
    if floor is not None and outcome.throughput < floor:
        found.append(f"{outcome.throughput:.1f} right answers a second, and at least {floor:.1f} must be")
    if limits.arrivals is not None and outcome.asked and tally.requests < limits.arrivals * outcome.asked - 1:
        came = tally.requests / outcome.asked
        found.append(
            f"{came:.1%} of the arrivals came to be, and at least {limits.arrivals:.1%} must: all users waited"
        )
    return found


def throughput_floor(outcome: Outcome, limits: Limits) -> float | None:
    """The limit, but no more than an arrival rate makes possible."""
    if limits.throughput is None or outcome.asked is None or not outcome.seconds:
        return limits.throughput
    return min(limits.throughput, 0.95 * outcome.asked / outcome.seconds)
