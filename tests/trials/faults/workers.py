"""Trials with workers that crash, hang, do not start, or lose their device."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from bundle.catalog import select
from tests.docker.stack import Stack, docker
from tests.support import reversioned
from tests.trials.faults.archives import copy_from_image, put, register_faulty
from tests.trials.faults.traffic import Answer, Connections, PoissonTraffic, error_type, eventually
from tests.trials.faults.trial import Outcome, Trial

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
RATE = 60.0  # requests per second: little load for a machine with two cores
DEADLINE = 26.0  # s: UPSTREAM_TIMEOUT and one second more
TEXT = "transfer some money"


def digit_traffic(stack: Stack, rate: float = RATE) -> PoissonTraffic:
    return PoissonTraffic(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3', rate)


def digit_connections(stack: Stack) -> Connections:
    return Connections(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3')


def text_traffic(stack: Stack, model: str, rate: float) -> PoissonTraffic:
    return PoissonTraffic(f"{stack.url('PORT')}/predictions/{model}", TEXT.encode(), '"label": "transfer"', rate)


def pids(stack: Stack, model: str) -> set[int]:
    return {worker["pid"] for worker in stack.client.describe(model)["workers"]}


def has_ready_workers(stack: Stack, model: str, workers: int, without: set[int] = frozenset()) -> bool:
    """Whether exactly this many workers are READY, and none of the PIDs in `without` is among them."""
    try:
        described = stack.client.describe(model)
    except requests.RequestException:
        return False
    ready = {worker["pid"] for worker in described["workers"] if worker["status"] == "READY"} if described else set()
    return len(ready) == workers and not ready & without


def scale(stack: Stack, model: str, workers: int) -> None:
    stack.client.scale(model, stack.client.describe(model)["modelVersion"], workers, workers)
    assert eventually(lambda: has_ready_workers(stack, model, workers), 60), (
        f"{model} does not reach {workers} READY workers"
    )


@contextmanager
def faulty(stack: Stack, workers: int = 2, settings: str = "") -> Iterator[str]:
    """Serve the model `faulty` while the block runs.

    Args:
        stack: where to serve it.
        workers: their number.
        settings: lines to add to its model-config.yaml.

    Yields:
        the URL for its predictions.
    """
    register_faulty(stack, settings)
    try:
        scale(stack, "faulty", workers)
        yield f"{stack.url('PORT')}/predictions/faulty"
    finally:
        stack.client.unregister("faulty", "1.0")


def kill(stack: Stack, pid: int) -> float:
    """Kill a process of TorchServe's container, and return the time."""
    stack.execute("sh", "-c", f"kill -9 {pid}")
    return time.monotonic()


def since(answers: list[Answer], moment: float) -> list[Answer]:
    return [answer for answer in answers if answer.due >= moment]


def kill_one(stack: Stack, seconds: float) -> Outcome:
    before = pids(stack, "mnist")
    with digit_traffic(stack) as traffic:
        time.sleep(seconds)
        killed = kill(stack, min(before))
        back = eventually(lambda: has_ready_workers(stack, "mnist", 2, {min(before)}), 60)
        recovery = time.monotonic() - killed
        time.sleep(seconds)
    outcome = Outcome(traffic.answers, recovery)
    outcome.require(outcome.answered == len(traffic.answers), "no request fails")
    outcome.require(back and recovery < 10, "two workers are READY again in under 10 s")
    return outcome


def kill_only(stack: Stack, seconds: float) -> Outcome:
    scale(stack, "mnist", 1)
    outcome = killed_only(stack, "mnist", digit_traffic(stack), seconds)
    scale(stack, "mnist", 2)
    return outcome


def killed_only(stack: Stack, model: str, sent: PoissonTraffic, seconds: float) -> Outcome:
    """Kill the only worker of a model under this traffic."""
    [pid] = pids(stack, model)
    with sent as traffic:
        time.sleep(seconds)
        killed = kill(stack, pid)
        back = eventually(lambda: has_ready_workers(stack, model, 1, {pid}), 60)
        recovery = time.monotonic() - killed
        time.sleep(seconds)
    outcome = Outcome(traffic.answers, recovery)
    outcome.require(outcome.lost == 0, "every request is answered")
    outcome.require(all(answer.seconds < DEADLINE for answer in traffic.answers), "no request exceeds its deadline")
    outcome.require(outcome.failed == 0, "requests are queued or rejected with Retry-After")
    outcome.require(back, "the worker recovers automatically")
    return outcome


def bad_archive(stack: Stack, seconds: float) -> Outcome:
    """Register an archive without labels by hand, then roll it out."""
    with tempfile.TemporaryDirectory() as temporary:
        good = copy_from_image(stack, "mnist", Path(temporary))
        bad = reversioned(good, "9.0", Path(temporary) / "bad.mar", without="index_to_name.json")
        put(stack, bad)
        with digit_traffic(stack) as traffic, text_traffic(stack, "text", RATE / 4) as others:
            time.sleep(seconds)
            asked = requests.post(
                f"{stack.url('MANAGEMENT_PORT')}/models", params={"url": "bad.mar", "model_name": "mnist"}, timeout=150
            )
            default = stack.client.describe("mnist")["modelVersion"]
            rolled = stack.roll_out("mnist", bad)
            time.sleep(seconds)
    outcome = Outcome(traffic.answers + others.answers)
    outcome.require(outcome.answered == len(outcome.answers), "the served models are unaffected")
    outcome.require(not asked.ok, "the registration is rejected")
    outcome.require(default == stack.client.describe("mnist")["modelVersion"] == "1.0", "it never becomes the default")
    outcome.require(rolled.returncode != 0, "the rollout is rejected")
    outcome.require("index_to_name.json" in rolled.stdout + rolled.stderr, "the message names the cause")
    return outcome


def give_up(stack: Stack, seconds: float) -> Outcome:
    """Delete the unpacked model's weights, then kill its workers; a restart unpacks the archive again."""
    with faulty(stack, settings="maxRetryTimeoutInSec: 1"):
        restarts = stack.inspect()["RestartCount"]
        remove = "rm $(dirname $(ls /tmp/torchserve-*/models/*/faulty.py))/model.pt"
        with text_traffic(stack, "faulty", RATE / 3) as traffic:
            time.sleep(seconds)
            stack.execute("sh", "-c", remove)
            for pid in pids(stack, "faulty"):
                killed = kill(stack, pid)
            restarted = eventually(lambda: stack.inspect()["RestartCount"] > restarts, 180)
            gave_up = given_up(docker("logs", stack.container()), "faulty")
            back = restarted and eventually(lambda: has_ready_workers(stack, "faulty", 2), 180)
            back = back and eventually(lambda: requests.get(f"{stack.url('PORT')}/ping", timeout=10).ok, 60)
            recovery = time.monotonic() - killed
            time.sleep(seconds)
    outcome = Outcome(traffic.answers, recovery)
    outcome.require(gave_up == 2, "TorchServe gives up on both workers")
    outcome.require(restarted, "the container is restarted automatically")
    outcome.require(bool(back), "all workers recover automatically")
    outcome.require(outcome.lost == 0, "every request is answered")
    outcome.require(all(answer.seconds < DEADLINE for answer in traffic.answers), "no request exceeds its deadline")
    outcome.require(
        all(answer.right for answer in since(traffic.answers, killed + recovery + 1)),
        "every answer after the recovery is correct",
    )
    return outcome


def given_up(log: str, model: str) -> int:
    """Return how many workers died and were not started again: TorchServe logs each death and each retry."""
    lines = [line for line in log.splitlines() if f"-{model}_" in line]
    deaths = sum("Auto recovery start timestamp" in line or "Auto recovery failed again" in line for line in lines)
    return deaths - sum("Retry worker" in line for line in lines)


def crash(stack: Stack, seconds: float) -> Outcome:
    """Crash a worker. TorchServe's frontend repeats its requests, so that one of them crashes a second worker."""
    with faulty(stack, workers=3) as url:
        before = pids(stack, "faulty")
        with text_traffic(stack, "faulty", RATE / 2) as traffic, digit_traffic(stack, RATE / 2) as others:
            time.sleep(seconds)
            began = time.monotonic()
            answer = requests.post(url, data=b"crash", timeout=60)
            took = time.monotonic() - began
            eventually(lambda: not has_ready_workers(stack, "faulty", 3), 5)
            back = eventually(lambda: has_ready_workers(stack, "faulty", 3), 60)
            recovery = time.monotonic() - began
            time.sleep(seconds)
        replaced = len(before - pids(stack, "faulty"))
    outcome = Outcome(traffic.answers + others.answers, recovery)
    outcome.notes.append(
        f"the crashing request got {answer.status_code} after {took:.1f} s; {replaced} of 3 workers were replaced"
    )
    problem = error_type(answer.text)
    # the proxy writes its own message for TorchServe's 500 WorkerDied
    outcome.require((answer.status_code, problem) == (500, "PredictionFailed"), "the request gets 500 PredictionFailed")
    outcome.require(replaced == 2, "two workers crash, and the third keeps serving")
    outcome.require(back and recovery < 15, "all workers are READY again in under 15 s")
    outcome.require(outcome.lost == outcome.failed == 0, "no other request fails")
    return outcome


def hang(stack: Stack, seconds: float) -> Outcome:
    with faulty(stack) as url:
        before = pids(stack, "faulty")
        with text_traffic(stack, "faulty", 5) as traffic, digit_traffic(stack) as others:
            time.sleep(seconds)
            began = time.monotonic()
            answer = requests.post(url, data=b"hang", timeout=60)
            took = time.monotonic() - began
            back = eventually(
                lambda: len(pids(stack, "faulty") - before) == 1 and has_ready_workers(stack, "faulty", 2), 60
            )
            recovery = time.monotonic() - began
            time.sleep(seconds)
    outcome = Outcome(traffic.answers + others.answers, recovery)
    outcome.notes.append(f"the hanging request got {answer.status_code} after {took:.1f} s")
    outcome.require(answer.status_code == 504 and took < DEADLINE, "the hanging request gets 504 at its deadline")
    outcome.require(back, "its worker is replaced")
    outcome.require(outcome.lost == 0, "every request is answered")
    outcome.require(all(answer.right for answer in others.answers), "other models are unaffected")
    outcome.require(sum(not answer.right for answer in traffic.answers) <= 2, "only its own batch fails with it")
    return outcome


def device(stack: Stack, seconds: float) -> Outcome:
    """Simulate a batch that does not fit into the device's memory, then a broken device."""
    with faulty(stack) as url:
        crowds: list[Answer] = []
        for _ in range(10):
            for _ in range(4):  # so that both workers get one
                requests.post(url, data=b"small transfer", timeout=30)
            with text_traffic(stack, "faulty", 400) as crowd:
                time.sleep(1)
            crowds += crowd.answers
            if halved := "do not fit" in stack.execute("sh", "-c", "cat /tmp/run/logs/model_log.log"):
                break
        with text_traffic(stack, "faulty", RATE) as traffic:
            time.sleep(seconds)
            before = pids(stack, "faulty")
            broke = time.monotonic()
            answer = requests.post(url, data=b"break", timeout=30)
            eventually(lambda: not has_ready_workers(stack, "faulty", 2), 5)
            back = eventually(lambda: has_ready_workers(stack, "faulty", 2), 60)
            recovery = time.monotonic() - broke
            time.sleep(seconds)
        replaced = len(before - pids(stack, "faulty"))
    outcome = Outcome(crowds + traffic.answers, recovery)
    outcome.notes.append(f"the request that breaks the device got {answer.status_code}; workers replaced: {replaced}")
    outcome.require(halved, "a batch that does not fit is halved")
    outcome.require(all(answer.right for answer in crowds), "every request of a batch that does not fit is answered")
    outcome.require(answer.status_code == 500 and replaced == 2, "the workers with the broken device exit")
    outcome.require(back, "the workers are restarted")
    outcome.require(outcome.lost == 0, "every request is answered")
    outcome.require(outcome.failed == 0, "no other request fails")
    return outcome


TRIALS = (
    Trial(
        "kill-one",
        "`kill -9` of one of two workers",
        "no request fails, because the other worker gets those of this one; two workers are READY again in under 10 s",
        kill_one,
    ),
    Trial(
        "kill-only",
        "`kill -9` of the only worker",
        "requests are queued or rejected with Retry-After, none exceeds its deadline, and the worker recovers "
        "automatically",
        kill_only,
    ),
    Trial(
        "bad-archive",
        "an archive whose worker cannot start is registered, then rolled out",
        "it never becomes the default; served models are unaffected; the error message names the cause",
        bad_archive,
    ),
    Trial(
        "give-up",
        "workers that cannot restart, until TorchServe gives up on them (`maxRetryTimeoutInSec`)",
        "the container is restarted automatically; every request is answered before its deadline",
        give_up,
    ),
    Trial(
        "hang",
        "a handler that hangs",
        "the request gets 504 at its deadline, the worker is replaced, other models are unaffected",
        hang,
    ),
    Trial(
        "crash",
        "a request that crashes its worker",
        "the request gets 500 `PredictionFailed`; two of three workers crash, and are READY again in under 15 s; no "
        "other request fails",
        crash,
    ),
    Trial(
        "device",
        "GPU out of memory, then a broken GPU (both simulated)",
        "the batch is halved and answered; the worker with the broken GPU, and the one that gets its requests, exit "
        "and are restarted; no other request fails",
        device,
    ),
)
