"""The bundle's own metrics, on TorchServe's `/metrics` beside its own (declared in bundle/config/metrics.yaml)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ts.context import Context
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.metrics.metric_type_enum import MetricTypes

STAGES = ("decode", "inference", "encode")
DIMENSIONS = ["ModelName", "ModelVersion"]


class HandlerMetrics:
    """Histograms of batch size (requests) and of the seconds of each stage, and a counter of rejected requests.

    The objects are taken from the worker's cache once: a look-up per batch would log and lock.
    """

    def __init__(self, context: Context):
        cache = context.metrics
        self.identity = [context.model_name, context.manifest["model"].get("modelVersion", "")]
        self.batch_size = histogram(cache, "bundle_batch_size", "Count")
        self.seconds = {stage: histogram(cache, f"bundle_{stage}_seconds", "Seconds") for stage in STAGES}
        self.rejected = metric(
            cache, "bundle_rejected_requests_total", "Count", [*DIMENSIONS, "ErrorType"], MetricTypes.COUNTER
        )

    def count_batch(self, requests: int) -> None:
        self.batch_size.add_or_update(requests, self.identity)

    def count_rejected(self, error_type: str) -> None:
        self.rejected.add_or_update(1, [*self.identity, error_type])

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage].add_or_update(round(time.perf_counter() - start, 6), self.identity)


def histogram(cache: MetricsCacheYamlImpl, name: str, unit: str) -> CachingMetric:
    return metric(cache, name, unit, DIMENSIONS, MetricTypes.HISTOGRAM)


def metric(
    cache: MetricsCacheYamlImpl, name: str, unit: str, dimensions: list[str], kind: MetricTypes
) -> CachingMetric:
    """The metric as metrics.yaml declares it; where the server has another metrics.yaml, one that it will ignore."""
    try:
        return cache.get_metric(name, kind)
    except MetricsCacheKeyError:
        return cache.add_metric_to_cache(name, unit, dimensions, kind)
