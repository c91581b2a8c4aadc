"""The thresholds that a run must meet, and the check whether it met them."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from loadtest.errors import LoadTestError
from loadtest.record import Tally

FILE = Path(__file__).resolve().parent / "thresholds.yaml"


@dataclass(frozen=True)
class Limits:
    """The thresholds of one model; None is not checked. thresholds.yaml explains each."""

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
class ModelResult:
    """The answers of one model in a run.

    Attributes:
        seconds: length of the run.
        due: number of requests that were due at a constant arrival rate; None for other shapes.
    """

    model: str
    tally: Tally
    seconds: float
    due: float | None = None

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.tally.right / self.seconds if self.seconds else 0.0


def read(file: Path, models: set[str]) -> Thresholds:
    """Read a file of thresholds.

    Args:
        file: YAML, as in thresholds.yaml.
        models: the known models.

    Raises:
        LoadTestError: the file cannot be read, names an unknown model or threshold, or has an invalid value.
    """
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except OSError as exc:
        raise LoadTestError(f"{file} cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise LoadTestError(f"{file} is not valid YAML: {exc}") from exc
    content = mapping(content, f"{file}")
    if unknown := content.keys() - {"defaults", "models"}:
        raise LoadTestError(f"{file}: unknown section {unknown.pop()!r}; the sections are defaults and models")
    defaults = limits(content.get("defaults"), f"{file}, defaults")
    own = mapping(content.get("models"), f"{file}, models")
    if unknown := own.keys() - models:
        raise LoadTestError(f"{file}: unknown model {unknown.pop()!r}; the models are: {', '.join(sorted(models))}")
    return Thresholds(
        Limits(**defaults), {name: Limits(**defaults | limits(of, f"{file}, {name}")) for name, of in own.items()}
    )


def mapping(content: object, place: str) -> dict:
    if not isinstance(content, dict | None):
        raise LoadTestError(f"{place}: {content!r} is not a mapping")
    return content or {}


def limits(content: object, place: str) -> dict[str, float | None]:
    section = mapping(content, place)
    for key, value in section.items():
        if key not in KEYS:
            raise LoadTestError(f"{place}: unknown threshold {key!r}; the thresholds are: {', '.join(KEYS)}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise LoadTestError(f"{place}: {key} is {value!r}, and must be a number of at least 0")
        if key in SHARES and value > 1:
            raise LoadTestError(f"{place}: {key} is {value}, and must be a share from 0 to 1")
    return section


def misses(result: ModelResult, limits: Limits) -> list[str]:
    """Return a description of each threshold that was missed; [] if all were met."""
    tally = result.tally
    p99 = tally.percentile(0.99)
    if p99 is None:
        return ["no right answer"]
    found = []
    if limits.p99_ms is not None and p99 > limits.p99_ms:
        found.append(f"p99 was {p99:.0f} ms, and must be at most {limits.p99_ms:g} ms")
    if limits.failures is not None and tally.share(tally.failed) > limits.failures:
        found.append(f"{tally.share(tally.failed):.2%} of the requests failed; at most {limits.failures:.2%} may")
    if limits.wrong is not None and tally.share(tally.wrong) > limits.wrong:
        found.append(f"{tally.share(tally.wrong):.2%} of the answers were wrong; at most {limits.wrong:.2%} may be")
    floor = throughput_floor(result, limits)
    if floor is not None and result.throughput < floor:
        found.append(f"throughput was {result.throughput:.1f} right answers a second, and must be at least {floor:.1f}")
    if limits.arrivals is not None and result.due and tally.requests < limits.arrivals * result.due - 1:
        found.append(
            f"{tally.requests / result.due:.1%} of the due requests were sent and answered, and at least "
            f"{limits.arrivals:.1%} must be: all users were waiting for answers"
        )
    return found


def throughput_floor(result: ModelResult, limits: Limits) -> float | None:
    """Return the lowest allowed throughput, which is not above what a constant arrival rate can reach."""
    if limits.throughput is None or result.due is None or not result.seconds:
        return limits.throughput
    return min(limits.throughput, 0.95 * result.due / result.seconds)
