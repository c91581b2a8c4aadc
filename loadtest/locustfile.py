"""The locustfile: each user sends the sample of one model repeatedly, and checks the answers.

There is one class of users for each model folder that has a sample: MnistUser, ImageUser, ...
Environment variables, which must be the same for the master and its workers:
  BUNDLE_MODELS  the folder with the model folders; by default models/
  MODELS         the models to test, with weights: "mnist text", "mnist=4 text=1"
  SHAPE          steps, spike, soak or rate; if unset, locust's own --users, --spawn-rate and --run-time apply
  USERS, DURATION, RATE  settings of the shape: users (64), duration (60s), requests a second
  CA_FILE        a PEM file of the authorities whose certificates are trusted; by default the public ones
  THRESHOLDS     the file of thresholds for a headless run; by default loadtest/thresholds.yaml
"""

import os
import ssl
import sys
import time
from pathlib import Path

import certifi
import gevent.ssl
from locust import FastHttpUser, LoadTestShape, events, task
from locust.env import Environment

sys.path.append(str(Path(__file__).resolve().parent.parent))
from loadtest import answers, report, shapes, targets, thresholds  # noqa: E402
from loadtest.arrivals import Schedule  # noqa: E402
from loadtest.errors import LoadTestError  # noqa: E402

try:
    TARGETS = targets.choose(os.environ.get("MODELS", ""))
    LOAD = shapes.Load.parse(os.environ, len(TARGETS))
    THRESHOLDS = thresholds.read(Path(os.environ.get("THRESHOLDS") or thresholds.FILE), targets.known_models())
except LoadTestError as error:
    sys.exit(f"error: {error}.")


def trusting() -> ssl.SSLContext:
    """Return what a user trusts of a server over TLS: the same as requests."""
    return gevent.ssl.create_default_context(cafile=os.environ.get("CA_FILE") or certifi.where())


class ModelUser(FastHttpUser):
    """Send the next request after the last answer or, at a constant arrival rate, at its due time."""

    abstract = True
    network_timeout = connection_timeout = 30.0  # seconds; later answers count as "no answer"
    ssl_context_factory = staticmethod(trusting)
    target: targets.Target
    schedule: Schedule | None = None

    def __init__(self, environment: Environment):
        # A plain server is not trusted in any way; if it redirects to TLS, as the proxy does, its name may be another.
        self.insecure = not (environment.host or "").startswith("https:")
        super().__init__(environment)

    def on_start(self) -> None:
        if LOAD and LOAD.rate:
            self.schedule = Schedule(LOAD.period, time.perf_counter())
            gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        return self.schedule.wait(time.perf_counter()) if self.schedule else 0

    def context(self) -> dict:
        return {"model": self.target.name}

    @task
    def predict(self) -> None:
        overdue = self.schedule.arrive(time.perf_counter()) if self.schedule else 0
        path = f"/predictions/{self.target.name}"
        arguments = {"headers": self.target.headers, "catch_response": True}
        body = self.target.sample  # bytes, which the annotation of `post` leaves out
        with self.client.post(path, data=body, **arguments) as answer:  # type: ignore[arg-type]
            meta = answer.request_meta
            meta["response_time"] += 1000 * overdue
            if wrong := answers.fault(answer.status_code, answer.text, self.target.expect, meta["exception"]):
                answer.failure(wrong)


# locust runs the user classes and the shape class that this module defines
for each in TARGETS:
    globals()[each.user] = type(each.user, (ModelUser,), {"weight": each.weight, "target": each})
if LOAD:
    users_at = LOAD.tick

    class Shape(LoadTestShape):
        def tick(self) -> tuple[int, float] | None:
            return users_at(self.get_run_time())


report.Report(TARGETS, LOAD, THRESHOLDS).listen(events)
