"""Serve the supervisor's `/metrics`, `/ready` and `/live`: metrics that TorchServe lacks, and reliable readiness."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import psutil
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bundle.errors import BundleError
from bundle.supervisor.health import History

LABELS = ("model_name", "model_version")
GAUGES = {
    "bundle_workers_ready": "READY workers.",
    "bundle_workers_wanted": "Minimum number of workers.",
    "bundle_queue_pending": "Queued requests.",
    "bundle_queue_capacity": "Requests that the queue can hold; further ones get 429.",
}
METRICS = (
    *GAUGES,
    "bundle_worker_memory_bytes",
    "bundle_worker_cpu_seconds_total",
    "bundle_worker_restarts_total",
    "bundle_failed_requests_total",
    "bundle_draining",
    "bundle_not_restored",
    "bundle_replicas_wanted",
)


class Exporter:
    """WSGI application of `/metrics`, `/ready` and `/live`.

    Args:
        failures: number of inference requests answered 5xx, by model, version and status.
        unready: returns why the server is not ready; "" if it is.
        draining: returns whether the server waits to stop.
        replicas: number of servers that serve the same, this one included; None if it is not known.
    """

    def __init__(
        self,
        history: History,
        failures: Counter[tuple[str, str, str]],
        unready: Callable[[], str],
        draining: Callable[[], bool],
        replicas: int | None = None,
    ):
        self.history, self.failures, self.unready, self.draining = history, failures, unready, draining
        self.replicas = replicas
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self.metrics = make_wsgi_app(registry)

    def collect(self) -> Iterable[Metric]:
        """Return all metrics, for the Prometheus client."""
        latest = list(self.history.latest)
        values = [(v.ready, v.registered.minimum, v.pending, v.capacity) for v in latest]
        for column, (name, text) in enumerate(GAUGES.items()):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            for version, row in zip(latest, values, strict=True):
                gauge.add_metric(version.key, row[column])
            yield gauge
        memory = GaugeMetricFamily("bundle_worker_memory_bytes", "Resident memory.", labels=(*LABELS, "pid"))
        cpu = CounterMetricFamily("bundle_worker_cpu_seconds", "User and system time.", labels=(*LABELS, "pid"))
        for version in latest:
            for pid in version.workers.values():
                try:
                    process = psutil.Process(pid)
                    times = process.cpu_times()
                    memory.add_metric((*version.key, str(pid)), process.memory_info().rss)
                    cpu.add_metric((*version.key, str(pid)), times.user + times.system)
                except (psutil.Error, ValueError):
                    continue  # it has just ended
        yield from (memory, cpu)
        restarts = CounterMetricFamily(
            "bundle_worker_restarts", "Workers that came back as another process.", labels=LABELS
        )
        for key, count in list(self.history.restarts.items()):
            restarts.add_metric(key, count)
        yield restarts
        failed = CounterMetricFamily(
            "bundle_failed_requests", "Inference requests answered 5xx.", labels=(*LABELS, "status")
        )
        for labels, count in list(self.failures.items()):
            failed.add_metric(labels, count)
        yield failed
        yield GaugeMetricFamily("bundle_draining", "1 while the server waits to stop.", value=self.draining())
        if self.replicas is not None:
            text = "Servers that should serve the same, this one included."
            yield GaugeMetricFamily("bundle_replicas_wanted", text, value=self.replicas)
        restored = GaugeMetricFamily(
            "bundle_not_restored", "1 for a version that could not be restored as it was saved.", labels=LABELS
        )
        not_restored = set(self.history.not_restored)
        for key in sorted({version.key for version in latest} | not_restored):
            restored.add_metric(key, key in not_restored)
        yield restored

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        """Answer a request."""
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self.metrics(environ, start_response)
        if path == "/ready":
            why = self.unready()
            start_response("503 Service Unavailable" if why else "200 OK", [("Content-Type", "application/json")])
            not_restored = [" ".join(key) for key in self.history.not_restored]
            return [json.dumps({"status": why or "ready", "not_restored": not_restored}).encode()]
        if path == "/live":  # also while the server starts or drains: what must be replaced ends by itself
            start_response("200 OK", [("Content-Type", "application/json")])
            return [b'{"status": "live"}']
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"Not found. This server has /metrics, /ready and /live.\n"]

    def serve(self, host: str, port: int) -> WSGIServer:
        """Serve in a background thread.

        Raises:
            BundleError: the address cannot be used.
        """
        try:
            server = make_server(host, port, self, handler_class=Quiet)
        except OSError as exc:
            raise BundleError(
                f"The supervisor cannot listen on {host}:{port}: {exc.strerror}. Set another --address."
            ) from exc
        threading.Thread(target=server.serve_forever, daemon=True, name="exporter").start()
        return server


class Quiet(WSGIRequestHandler):
    timeout = 5  # s; a silent client must not block the only thread

    def log_message(self, format: str, *arguments: object) -> None:
        pass
