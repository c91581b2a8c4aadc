"""What a model predicts, counted for the metrics that show drift: its classes, and how confident it is of them.

A request only adds to two lists. A thread prints what was added, some seconds later, so that the lines of metrics cost
the same at any load.
"""

import logging
import re
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from ts.metrics.caching_metric import CachingMetric

from handlers.core.slots import Answer, Picture

logger = logging.getLogger(__name__)

REFERENCE_NAME = "reference.json"
BOUNDS = tuple(tenth / 10 for tenth in range(1, 11))  # the largest confidence of each interval
INTERVALS = tuple(map(str, BOUNDS))
OTHER = "other"  # the classes that are not counted on their own
SECONDS = 5.0  # until a prediction is in the metrics: as often as Prometheus reads them

# A line of metrics, without its value: see `HandlerMetrics.line`
Line = Callable[..., str]


class Reference(BaseModel):
    """What a model predicts for known inputs, with which the predictions of a server are compared.

    Attributes:
        source: what the inputs are.
        examples: their number.
        weights: SHA-256 digest (hex) of the file with the model's weights; None if it is not known.
        classes: the share of the examples in which each outcome comes first, by label; 0 for those that are missing.
        confidence: the share of each interval, by its name in `INTERVALS`, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    examples: int
    weights: str | None = None
    classes: dict[str, float]
    confidence: dict[str, float]

    def share(self, outcomes: Sequence[str], names: Sequence[str]) -> dict[str, float]:
        """Return the share of each name, which stands for one or several outcomes."""
        shares = dict.fromkeys(names, 0.0)
        for label, name in dict(zip(outcomes, names, strict=True)).items():  # each label once
            shares[name] += self.classes.get(label, 0.0)
        return shares


def interval(confidence: float) -> int:
    """Return the index of the interval that a confidence is in; rounding may make it larger than 1."""
    return min(bisect_left(BOUNDS, confidence), len(BOUNDS) - 1)


def printable(label: str) -> str:
    """Return a label without the characters that separate the parts of a line of metrics."""
    return " ".join(re.sub(r"[,:|]", " ", label).split()) or "_"


def counted(outcomes: Sequence[str], limit: int, reference: Reference | None) -> list[str]:
    """Return the name under which each outcome is counted: its label, or "other".

    Args:
        outcomes: the labels of the classes, by index.
        limit: the most names beside "other". If there are more labels, those that the reference has most often are
            kept; without a reference, none is.
    """
    if len(set(outcomes)) <= limit:
        return [printable(label) for label in outcomes]
    shares = reference.classes if reference else {}
    kept = set(sorted(shares, key=lambda label: -shares[label])[:limit])
    return [printable(label) if label in kept else OTHER for label in outcomes]


class Series:
    """Counts that become lines of metrics: how much each has grown since the last time.

    One thread adds to `counts`, and another one reads them. They only grow, so that neither waits for the other.

    Args:
        metric: of the lines.
        names: the last dimension, for each count. Counts of one name are added up.
    """

    def __init__(self, metric: CachingMetric, names: Sequence[str]):
        self.metric, self.names = metric, names
        self.counts = [0] * len(names)
        self.printed: Counter[str] = Counter()

    def lines(self, line: Line) -> list[str]:
        totals: Counter[str] = Counter()
        for name, count in zip(self.names, self.counts, strict=True):
            totals[name] += count
        # at first also those that are 0: Prometheus needs a sample from before the first increase
        grown = [name for name in totals if name not in self.printed or totals[name] > self.printed[name]]
        made = [line(self.metric, totals[name] - self.printed[name], name) for name in grown]
        self.printed = totals
        return made


class Predictions:
    """Count the outcomes that come first, and the intervals of their confidence.

    Args:
        line: makes a line of metrics of a metric, a value and a dimension.
        first: returns the index of an answer's first outcome, and its confidence; None if it has none.
        outcomes: counts by index.
        confidence: counts by interval.
    """

    def __init__(
        self, line: Line, first: Callable[[Any], tuple[int, float | None]], outcomes: Series, confidence: Series
    ):
        self.line, self.first, self.outcomes, self.confidence = line, first, outcomes, confidence
        self.due = False

    def count(self, answers: Iterable[Answer]) -> None:
        """Count answers. Pictures are left out, because they do not say what is in them."""
        for answer in answers:
            if isinstance(answer, Picture):
                continue
            outcome, confidence = self.first(answer)
            self.outcomes.counts[outcome] += 1
            if confidence is not None:
                self.confidence.counts[interval(confidence)] += 1
        if not self.due:
            self.due = True
            timer = threading.Timer(SECONDS, self.emit)
            timer.daemon = True  # the end of the worker does not wait for it
            timer.start()

    def emit(self) -> None:
        """Print what was counted since the last time."""
        self.due = False  # first: what is counted from now on starts the next timer
        lines = self.outcomes.lines(self.line) + self.confidence.lines(self.line)
        if lines:
            logger.info("\n".join(lines))
