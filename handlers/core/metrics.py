"""The handlers' metrics. TorchServe's `/metrics` shows them beside its own (bundle/config/metrics.yaml declares them).

The worker prints each observation as a line, and the frontend parses it. So nothing is observed per request, and the
lines of a batch are printed at once (BENCHMARKS.md). Predictions are printed every few seconds (`predictions.py`).
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ts.context import Context
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.metrics.metric_type_enum import MetricTypes

from handlers.core.errors import RequestError, ServingError
from handlers.core.predictions import INTERVALS, Predictions, Reference, Series, counted
from handlers.core.slots import Answer

logger = logging.getLogger(__name__)

STAGES = ("queue", "decode", "inference", "encode", "request")
DIMENSIONS = ["ModelName", "ModelVersion"]


class HandlerMetrics:
    """Histograms of the batch size and of the seconds of each stage; counters of responses and of rejections.

    "queue" is the time from the proxy's X-Request-Start until the batch starts, "request" until its responses are
    encoded. Both are those of the request that waited longest, and so an upper bound for the other requests.

    The metrics are looked up in the worker's cache once: a look-up per batch would log and lock.

    Attributes:
        arrival: when the first request of the batch came; None if that is unknown.
        stages: (name, start, end, whether it succeeded) of the batch's stages, for its trace.
    """

    def __init__(self, context: Context):
        self.cache = cache = context.metrics
        self.identity = [context.model_name, context.manifest["model"].get("modelVersion", "")]
        self.batch_size = histogram(cache, "bundle_batch_size", "Count")
        self.seconds = {stage: histogram(cache, f"bundle_{stage}_seconds", "Seconds") for stage in STAGES}
        self.answered = counter(cache, "bundle_requests_total", "Status")
        self.rejected = counter(cache, "bundle_rejected_requests_total", "ErrorType")

        self.arrival: float | None = None
        self.stages: list[tuple[str, float, float, bool]] = []
        self.predictions: Predictions | None = None
        self.lines: list[str] = []
        self.texts: dict[tuple[str, ...], tuple[str, str]] = {}

    def watch(
        self,
        first: Callable[[Any], tuple[int, float | None]],
        outcomes: Sequence[str],
        limit: int,
        reference: Reference | None,
    ) -> None:
        """Count predictions from now on, and print the reference with which they are compared.

        Args:
            first: returns the index of an answer's first outcome, and its confidence; None if it has none.
            outcomes: their labels, by index.
            limit: the most outcomes that have a counter of their own.
            reference: of this model.
        """
        names = counted(outcomes, limit, reference)
        self.predictions = Predictions(
            self.line,
            first,
            Series(counter(self.cache, "bundle_predictions_total", "Class"), names),
            Series(counter(self.cache, "bundle_confidence_total", "Confidence"), INTERVALS),
        )
        self.predictions.emit()
        if reference is not None:
            share = gauge(self.cache, "bundle_predictions_reference", "Class")
            confidence = gauge(self.cache, "bundle_confidence_reference", "Confidence")
            for name, value in reference.share(outcomes, names).items():
                self.add(share, round(value, 6), name)
            for name in INTERVALS:
                self.add(confidence, reference.confidence.get(name, 0.0), name)
            self.emit()

    def add(self, metric: CachingMetric, value: float, *dimensions: str) -> None:
        self.lines.append(self.line(metric, value, *dimensions))

    def line(self, metric: CachingMetric, value: float, *dimensions: str) -> str:
        """Return a line in the format of `CachingMetric.emit_metrics`, which the frontend parses."""
        key = metric.metric_name, *dimensions
        if key not in self.texts:
            self.texts[key] = self.around_value(metric, dimensions)
        before, after = self.texts[key]
        return f"{before}{value}{after}{int(time.time())}"

    def around_value(self, metric: CachingMetric, dimensions: tuple[str, ...]) -> tuple[str, str]:
        """Return what a line has before the value, and between the value and the time: the same in every batch."""
        names = zip(metric.dimension_names, [*self.identity, *dimensions], strict=True)
        described = ",".join(f"{name}:{dimension}" for name, dimension in names)
        return (
            f"[METRICS]{metric.metric_name}.{metric.unit}:",
            f"|#{described}|#type:{metric.metric_type.name}|#hostname:{socket.gethostname()},",
        )

    def emit(self) -> None:
        """Print the added lines, and forget them."""
        logger.info("\n".join(self.lines))
        self.lines.clear()

    def begin(self, arrivals: Sequence[float | None]) -> None:
        """Begin a batch of requests that came at these times; None if a time is unknown."""
        self.stages = []
        self.arrival = min(filter(None, arrivals), default=None)
        if self.arrival is not None:
            self.observe("queue", time.time() - self.arrival)
        self.add(self.batch_size, len(arrivals))

    def end(self) -> None:
        """End a batch: print its lines."""
        if self.arrival is not None:
            self.observe("request", time.time() - self.arrival)
        self.emit()

    def count_answers(self, errors: list[ServingError | None]) -> None:
        """Count the HTTP statuses of a batch, and the error types of the requests that were rejected as invalid."""
        for status, requests in Counter(error.code if error else 200 for error in errors).items():
            self.add(self.answered, requests, str(status))
        rejections = (type(error).__name__ for error in errors if isinstance(error, RequestError))
        for error_type, requests in Counter(rejections).items():
            self.add(self.rejected, requests, error_type)

    def count_predictions(self, answers: list[Answer]) -> None:
        """Count answers of one request. If the handler's `first` fails, the answers are sent all the same."""
        if self.predictions is None:
            return
        try:
            self.predictions.count(answers)
        except Exception:
            self.predictions = None
            logger.exception("a bug in `first`: the predictions of %s are not counted any more", self.identity[0])

    def observe(self, stage: str, seconds: float) -> None:
        self.add(self.seconds[stage], round(seconds, 6))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure a stage: for the metrics if it succeeds, and for the trace."""
        start, fine = time.perf_counter(), False
        try:
            yield
            fine = True
        finally:
            end = time.perf_counter()
            self.stages.append((stage, start, end, fine))
        if stage in self.seconds:
            self.observe(stage, end - start)


def histogram(cache: MetricsCacheYamlImpl, name: str, unit: str) -> CachingMetric:
    return metric(cache, name, unit, DIMENSIONS, MetricTypes.HISTOGRAM)


def counter(cache: MetricsCacheYamlImpl, name: str, dimension: str) -> CachingMetric:
    return metric(cache, name, "Count", [*DIMENSIONS, dimension], MetricTypes.COUNTER)


def gauge(cache: MetricsCacheYamlImpl, name: str, dimension: str) -> CachingMetric:
    return metric(cache, name, "Count", [*DIMENSIONS, dimension], MetricTypes.GAUGE)


def metric(
    cache: MetricsCacheYamlImpl, name: str, unit: str, dimensions: list[str], kind: MetricTypes
) -> CachingMetric:
    """Return the metric that metrics.yaml declares; if the server's metrics.yaml lacks it, one that it will ignore."""
    try:
        return cache.get_metric(name, kind)
    except MetricsCacheKeyError:
        return cache.add_metric_to_cache(name, unit, dimensions, kind)
