"""Trials of what operators do and disks suffer: a stop, a rollout, more and fewer workers, a disk full of logs."""

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import requests

from tests.docker.stack import Stack, docker
from tests.support import reversioned
from tests.trials.faults.archives import shipped
from tests.trials.faults.traffic import eventually
from tests.trials.faults.trial import Outcome, Trial
from tests.trials.faults.workers import digits, faulty, since, whole

LOG_MEGABYTES = 200  # three logs of 20 MB, and five compressed ones behind each, which hold less


def full_disk(stack: Stack, seconds: float) -> Outcome:
    """First as many lines as the logs rotate at, then no room at all."""
    with faulty(stack) as url, digits(stack) as traffic:
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
    outcome.notes.append(f"60 MB of lines leave {size} MB of logs; then {free} MB are free for {2 * seconds:.0f} s")
    outcome.require("model_log.1.log.gz" in rotated and size < LOG_MEGABYTES, "logs rotate and are bounded")
    outcome.require(bool(since(traffic.answers, full)) and free == "0", "the disk was full")
    outcome.require(outcome.answered == len(traffic.answers), "serving goes on")
    return outcome


def sigterm(stack: Stack, seconds: float) -> Outcome:
    container = stack.container()
    with digits(stack) as traffic:
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
        outcome.lost == 0 and outcome.failed == 0, "every accepted request is answered, others told when to come"
    )
    outcome.require(all(a.right for a in traffic.answers if a.due < asked - 0.1), "what came before it is answered")
    outcome.require((state["Status"], state["ExitCode"]) == ("exited", 0), "it ends by itself, with status 0")
    outcome.require(back, "and starts again")
    return outcome


def rollout(stack: Stack, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        good = shipped(stack, "mnist", Path(temporary))
        new = reversioned(good, "1.1", Path(temporary) / "new.mar")
        with digits(stack) as traffic:
            time.sleep(seconds)
            rolled = stack.roll_out("mnist", new)
            time.sleep(seconds)
    outcome = Outcome(traffic.answers)
    outcome.require(rolled.returncode == 0, "the rollout succeeds")
    outcome.require(stack.client.describe("mnist")["modelVersion"] == "1.1", "the new version is the default")
    outcome.require(outcome.answered == len(traffic.answers), "zero failed")
    return outcome


def scaling(stack: Stack, seconds: float) -> Outcome:
    """TorchServe now and then drops a request that it collects for a worker in the moment in which that is ended."""
    version = stack.client.describe("mnist")["modelVersion"]
    steps = (2, 3, 1, 3, 2, 1, 2)
    with digits(stack) as traffic:
        for workers in steps[1:]:
            stack.client.scale("mnist", version, workers, workers)
            eventually(lambda count=workers: whole(stack, "mnist", count), 60)
            time.sleep(seconds / 2)
    ended = sum(max(0, before - after) for before, after in pairwise(steps))
    outcome = Outcome(traffic.answers)
    outcome.notes.append(f"{' to '.join(map(str, steps))} workers")
    outcome.require(outcome.failed <= ended, f"of each worker that ends, one request fails at most ({ended} end)")
    outcome.require(outcome.lost == 0, "no request is without an answer")
    return outcome


TRIALS = (
    Trial("full-disk", "a disk full of logs", "logs rotate and are bounded; serving goes on", full_disk),
    Trial("sigterm", "SIGTERM under load", "every accepted request is answered, later ones told when to come", sigterm),
    Trial("rollout", "a rollout under load", "zero failed", rollout),
    Trial(
        "scaling",
        "more and fewer workers under load",
        "none lost; at most one failed of each worker that ends (4 here): TorchServe drops one now and then",
        scaling,
    ),
)
