"""The bundle's own metrics, on TorchServe's `/metrics` beside its own (declared in bundle/config/metrics.yaml).

Each observation is a line that the worker prints and the frontend parses, so nothing here is observed per request, and
a batch's lines are printed at once (BENCHMARKS.md).
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ts.context import Context
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.metrics.metric_type_enum import MetricTypes

logger = logging.getLogger(__name__)

STAGES = ("queue", "decode", "inference", "encode", "request")
DIMENSIONS = ["ModelName", "ModelVersion"]


class HandlerMetrics:
    """Histograms of batch size (requests) and of the seconds of each stage; counters of answers and of rejections.

    "queue" is the time from a proxy's X-Request-Start until the batch begins, "request" until its answers are encoded;
    each of the request in the batch that waited longest, which is an upper bound for the others.

    The objects are taken from the worker's cache once: a look-up per batch would log and lock.
    """

    def __init__(self, context: Context):
        cache = context.metrics
        self.identity = [context.model_name, context.manifest["model"].get("modelVersion", "")]
        self.batch_size = histogram(cache, "bundle_batch_size", "Count")
        self.seconds = {stage: histogram(cache, f"bundle_{stage}_seconds", "Seconds") for stage in STAGES}
        self.answered = counter(cache, "bundle_requests_total", "Status")
        self.rejected = counter(cache, "bundle_rejected_requests_total", "ErrorType")

        self.lines: list[str] = []

    def add(self, metric: CachingMetric, value: float, *dimensions: str) -> None:
        """In the notation of `CachingMetric.emit_metrics`, which the frontend parses."""
        names = zip(metric.dimension_names, [*self.identity, *dimensions], strict=True)
        described = ",".join(f"{name}:{dimension}" for name, dimension in names)
        self.lines.append(
            f"[METRICS]{metric.metric_name}.{metric.unit}:{value}|#{described}|#type:{metric.metric_type.name}|"
            f"#hostname:{socket.gethostname()},{int(time.time())}"
        )

    def emit(self) -> None:
        """Prints what has been added."""
        logger.info("\n".join(self.lines))
        self.lines.clear()

    def count_batch(self, requests: int) -> None:
        self.add(self.batch_size, requests)

    def count_answers(self, statuses: list[int], rejections: list[str]) -> None:
        """Counts a batch's HTTP statuses, and the types of error of those that were the request's own fault."""
        for status, requests in Counter(statuses).items():
            self.add(self.answered, requests, str(status))
        for error_type, requests in Counter(rejections).items():
            self.add(self.rejected, requests, error_type)

    def observe(self, stage: str, seconds: float) -> None:
        self.add(self.seconds[stage], round(seconds, 6))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.observe(stage, time.perf_counter() - start)


def histogram(cache: MetricsCacheYamlImpl, name: str, unit: str) -> CachingMetric:
    return metric(cache, name, unit, DIMENSIONS, MetricTypes.HISTOGRAM)


def counter(cache: MetricsCacheYamlImpl, name: str, dimension: str) -> CachingMetric:
    return metric(cache, name, "Count", [*DIMENSIONS, dimension], MetricTypes.COUNTER)


def metric(
    cache: MetricsCacheYamlImpl, name: str, unit: str, dimensions: list[str], kind: MetricTypes
) -> CachingMetric:
    """The metric as metrics.yaml declares it; where the server has another metrics.yaml, one that it will ignore."""
    try:
        return cache.get_metric(name, kind)
    except MetricsCacheKeyError:
        return cache.add_metric_to_cache(name, unit, dimensions, kind)
