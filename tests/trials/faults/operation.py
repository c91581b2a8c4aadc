"""Trials of operation: a stop, a rollout, scaling, a full disk."""

import tempfile
import time
from pathlib import Path

import requests

from tests.docker.stack import Stack, docker
from tests.support import reversioned
from tests.trials.faults.archives import copy_from_image
from tests.trials.faults.traffic import Connections, eventually
from tests.trials.faults.trial import Outcome, Trial
from tests.trials.faults.workers import digit_connections, digit_traffic, faulty, has_ready_workers, since

CONNECTION_SECONDS = 3.0  # the longest silence of one connection; calls that held a frontend's thread took 7 to 11 s
LOG_MEGABYTES = 200  # more than three logs of 20 MB with five compressed older files each


def full_disk(stack: Stack, seconds: float) -> Outcome:
    """Write log lines until the logs rotate, then fill the disk."""
    with faulty(stack) as url, digit_traffic(stack) as traffic:
        for _ in range(60):
            requests.post(url, data=b"log", timeout=60)
        size = int(stack.execute("sh", "-c", "du -sm /tmp/run/logs").split()[0])
        rotated = stack.execute("sh", "-c", "ls /tmp/run/logs")
        stack.execute("sh", "-c", "dd if=/dev/zero of=/tmp/fill bs=1M 2>/dev/null; true")
        full = time.monotonic()
        for _ in range(5):
            requests.post(url, data=b"log", timeout=60)
        time.sleep(2 * seconds)
        free = stack.execute("sh", "-c", "df -m /tmp | tail -1").split()[3]
        stack.execute("rm", "/tmp/fill")
        time.sleep(seconds)
    outcome = Outcome(traffic.answers)
    outcome.notes.append(f"60 MB of log lines take {size} MB; then the disk has {free} MB free for {2 * seconds:.0f} s")
    outcome.require("model_log.1.log.gz" in rotated and size < LOG_MEGABYTES, "logs rotate and are bounded")
    outcome.require(bool(since(traffic.answers, full)) and free == "0", "the disk was full")
    outcome.require(outcome.answered == len(traffic.answers), "serving continues")
    return outcome


def sigterm(stack: Stack, seconds: float) -> Outcome:
    container = stack.container()
    with digit_traffic(stack) as traffic:
        time.sleep(seconds)
        asked = time.monotonic()
        docker("stop", "--time", "120", container)
        stopped = time.monotonic() - asked
        state = stack.inspect()["State"]
        time.sleep(1)
        docker("start", container)
        began = time.monotonic()
        back = eventually(lambda: requests.get(f"{stack.url('PORT')}/ping", timeout=10).ok, 120)
        recovery = time.monotonic() - began
        time.sleep(seconds)
    stack.wait_until_healthy()
    outcome = Outcome(traffic.answers, recovery)
    outcome.notes.append(f"stopped after {stopped:.1f} s")
    outcome.require(
        outcome.lost == 0 and outcome.failed == 0,
        "every accepted request is answered, others are rejected with Retry-After",
    )
    outcome.require(
        all(a.right for a in traffic.answers if a.due < asked - 0.1), "requests before SIGTERM are answered"
    )
    outcome.require((state["Status"], state["ExitCode"]) == ("exited", 0), "the container exits with status 0")
    outcome.require(back, "it starts again")
    return outcome


def rollout(stack: Stack, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        good = copy_from_image(stack, "mnist", Path(temporary))
        new = reversioned(good, "1.1", Path(temporary) / "new.mar")
        with digit_traffic(stack) as traffic, digit_connections(stack) as connections:
            time.sleep(seconds)
            rolled = stack.roll_out("mnist", new)
            time.sleep(seconds)
    outcome = Outcome(traffic.answers)
    require_no_silence(outcome, connections)
    outcome.require(rolled.returncode == 0, "the rollout succeeds")
    outcome.require(stack.client.describe("mnist")["modelVersion"] == "1.1", "the new version is the default")
    outcome.require(outcome.answered == len(outcome.answers), "no request fails")
    return outcome


def registration(stack: Stack, seconds: float) -> Outcome:
    """Register a model with a call that waits for its workers, and scale it with another one."""
    management = stack.client.management
    workers = {"min_worker": 3, "max_worker": 3, "synchronous": "true"}
    with digit_traffic(stack) as traffic, digit_connections(stack) as connections:
        time.sleep(seconds)
        query = {"url": "mnist.mar", "model_name": "waiting", "synchronous": "true"}
        calls = [requests.post(f"{management}/models", params=query, timeout=150)]
        calls.append(requests.put(f"{management}/models/waiting", params=workers, timeout=150))
        calls.append(requests.delete(f"{management}/models/waiting", timeout=150))
        time.sleep(seconds)
    outcome = Outcome(traffic.answers)
    require_no_silence(outcome, connections)
    outcome.require(all(call.ok for call in calls), "the calls succeed")
    outcome.require(outcome.answered == len(outcome.answers), "no request fails")
    return outcome


def require_no_silence(outcome: Outcome, connections: Connections) -> None:
    """Require that every connection was answered all the time, and note the longest silence of one."""
    for answers in connections.answers:
        outcome.answers += answers
    outcome.notes.append(
        f"the longest silence of one of {len(connections.answers)} connections that stay open is "
        f"{connections.silence:.2f} s"
    )
    outcome.require(connections.silence < CONNECTION_SECONDS, f"no connection is silent for {CONNECTION_SECONDS:g} s")


def scaling(stack: Stack, seconds: float) -> Outcome:
    version = stack.client.describe("mnist")["modelVersion"]
    steps = (2, 3, 1, 3, 2, 1, 2)
    with digit_traffic(stack) as traffic:
        for workers in steps[1:]:
            stack.client.scale("mnist", version, workers, workers)
            eventually(lambda count=workers: has_ready_workers(stack, "mnist", count), 60)
            time.sleep(seconds / 2)
    outcome = Outcome(traffic.answers)
    outcome.notes.append(f"workers: {', '.join(map(str, steps))}")
    outcome.require(outcome.lost == outcome.failed == 0, "no request fails")
    return outcome


TRIALS = (
    Trial("full-disk", "a disk full of logs", "logs rotate and are bounded; serving continues", full_disk),
    Trial(
        "sigterm",
        "SIGTERM under load",
        "every accepted request is answered; later requests are rejected with Retry-After",
        sigterm,
    ),
    Trial("rollout", "a rollout under load", "no request fails; no connection is silent for 3 s", rollout),
    Trial(
        "registration",
        "management calls that wait for workers (`synchronous=true`)",
        "no request fails; no connection is silent for 3 s",
        registration,
    ),
    Trial(
        "scaling",
        "scaling up and down under load",
        "no request fails",
        scaling,
    ),
)
