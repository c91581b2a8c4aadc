"""Prometheus metrics that TorchServe has not, and readiness that is true: `/metrics` and `/ready` of the supervisor."""

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
    "bundle_workers_ready": "Workers that are READY.",
    "bundle_workers_wanted": "Workers that there must be at least.",
    "bundle_queue_pending": "Requests that wait for a worker.",
    "bundle_queue_capacity": "Requests that may wait; further ones get 503.",
}
METRICS = (
    *GAUGES,
    "bundle_worker_memory_bytes",
    "bundle_worker_cpu_seconds_total",
    "bundle_worker_restarts_total",
    "bundle_failed_requests_total",
    "bundle_draining",
)


class Exporter:
    """Serves what a supervisor knows.

    Args:
        unready: says why the server is not ready; "" where it is.
        failures: inference requests that were answered 5xx: {(model, version, status): count}.
    """

    def __init__(
        self,
        history: History,
        failures: Counter[tuple[str, str, str]],
        unready: Callable[[], str],
        draining: Callable[[], bool],
    ):
        self.history, self.failures, self.unready, self.draining = history, failures, unready, draining
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self.metrics = make_wsgi_app(registry)

    def collect(self) -> Iterable[Metric]:
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
        for key, count in list(self.failures.items()):
            failed.add_metric(key, count)
        yield failed
        yield GaugeMetricFamily("bundle_draining", "1 while the server waits to stop.", value=self.draining())

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        """The WSGI application."""
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self.metrics(environ, start_response)
        if path == "/ready":
            why = self.unready()
            start_response("503 Service Unavailable" if why else "200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"status": why or "ready"}).encode()]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"There are /metrics and /ready.\n"]

    def serve(self, host: str, port: int) -> WSGIServer:
        """Listens in the background.

        Raises:
            BundleError: the address cannot be used.
        """
        try:
            server = make_server(host, port, self, handler_class=Quiet)
        except OSError as exc:
            raise BundleError(
                f"The supervisor cannot listen on {host}:{port}: {exc.strerror}. Give it another --address."
            ) from exc
        threading.Thread(target=server.serve_forever, daemon=True, name="exporter").start()
        return server


class Quiet(WSGIRequestHandler):
    timeout = 5  # one thread serves all: nobody holds it

    def log_message(self, format: str, *arguments: object) -> None:
        pass
