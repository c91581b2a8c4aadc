"""Load on the served models: a user sends one model its own sample again and again, and checks what comes first.

There is one class of users for each folder in models/ that has a sample: MnistUser, ImageUser, ...
The environment says the rest, and must be the same for master and workers:
  BUNDLE_MODELS    the folder of the model folders: models/
  MODELS    which models, and their weights: "mnist text", "mnist=4 text=1"
  SHAPE     steps, spike, soak or rate; without it, locust's own --users, --spawn-rate and --run-time
  USERS, DURATION, RATE    of the shape: 64, 60s, and arrivals a second
  THRESHOLDS    the file of what a headless run must hold: loadtest/thresholds.yaml
"""

import os
import sys
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, LoadTestShape, events, task

sys.path.append(str(Path(__file__).resolve().parent.parent))
from loadtest import answers, report, shapes, targets, thresholds  # noqa: E402
from loadtest.arrivals import Schedule  # noqa: E402
from loadtest.errors import LoadTestError  # noqa: E402

try:
    TARGETS = targets.choose(os.environ.get("MODELS", ""))
    LOAD = shapes.Load.parse(os.environ, len(TARGETS))
    THRESHOLDS = thresholds.read(Path(os.environ.get("THRESHOLDS") or thresholds.FILE), set(targets.sections()))
except LoadTestError as error:
    sys.exit(f"error: {error}")


class ModelUser(FastHttpUser):
    """Asks as soon as it is answered; with an arrival rate, when the next arrival is due."""

    abstract = True
    network_timeout = connection_timeout = 30.0  # what takes longer is a failure: "no answer"
    target: targets.Target
    schedule: Schedule | None = None

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
        with self.client.post(path, data=self.target.sample, catch_response=True) as answer:
            meta = answer.request_meta
            meta["response_time"] += 1000 * overdue
            if wrong := answers.fault(answer.status_code, answer.text, self.target.expect, meta["exception"]):
                answer.failure(wrong)


# locust takes every class of users, and the one shape, that it finds in this module
for found in TARGETS:
    globals()[found.user] = type(found.user, (ModelUser,), {"weight": found.weight, "target": found})
if LOAD:

    class Shape(LoadTestShape):
        def tick(self) -> tuple[int, float] | None:
            return LOAD.tick(self.get_run_time())


report.Report(TARGETS, LOAD, THRESHOLDS).listen(events)
