"""Trials of workers that die, hang, do not start, or lose their device."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from bundle.catalog import select
from tests.docker.stack import Stack, docker
from tests.support import reversioned
from tests.trials.faults.archives import put, register_faulty, shipped
from tests.trials.faults.traffic import Answer, Traffic, eventually
from tests.trials.faults.trial import Outcome, Trial

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
RATE = 60.0  # requests a second: a machine of two cores is far from busy with it
DEADLINE = 26.0  # UPSTREAM_TIMEOUT, and a second
TEXT = "transfer some money"


def digits(stack: Stack, rate: float = RATE) -> Traffic:
    return Traffic(f"{stack.url('PORT')}/predictions/mnist", DIGIT, '"top_3_classes": [3', rate)


def texts(stack: Stack, model: str, rate: float) -> Traffic:
    return Traffic(f"{stack.url('PORT')}/predictions/{model}", TEXT.encode(), '"label": "transfer"', rate)


def pids(stack: Stack, model: str) -> set[int]:
    return {worker["pid"] for worker in stack.client.describe(model)["workers"]}


def whole(stack: Stack, model: str, workers: int, without: set[int] = frozenset()) -> bool:
    """Whether so many workers are READY, none of these among them."""
    try:
        described = stack.client.describe(model)
    except requests.RequestException:
        return False
    ready = {worker["pid"] for worker in described["workers"] if worker["status"] == "READY"} if described else set()
    return len(ready) == workers and not ready & without


def scale(stack: Stack, model: str, workers: int) -> None:
    stack.client.scale(model, stack.client.describe(model)["modelVersion"], workers, workers)
    assert eventually(lambda: whole(stack, model, workers), 60), f"{model} does not come to {workers} workers"


@contextmanager
def faulty(stack: Stack, workers: int = 2, settings: str = "") -> Iterator[str]:
    """The model `faulty` is served while the block runs.

    Args:
        settings: lines to add to its model-config.yaml.

    Yields:
        where to ask it.
    """
    register_faulty(stack, settings)
    try:
        scale(stack, "faulty", workers)
        yield f"{stack.url('PORT')}/predictions/faulty"
    finally:
        stack.client.unregister("faulty", "1.0")


def kill(stack: Stack, pid: int) -> float:
    """Kills a process of TorchServe's container, and says when."""
    stack.execute("sh", "-c", f"kill -9 {pid}")
    return time.monotonic()


def since(answers: list[Answer], moment: float) -> list[Answer]:
    return [answer for answer in answers if answer.due >= moment]


def kill_one(stack: Stack, seconds: float) -> Outcome:
    before = pids(stack, "mnist")
    with digits(stack) as traffic:
        time.sleep(seconds)
        killed = kill(stack, min(before))
        back = eventually(lambda: whole(stack, "mnist", 2, {min(before)}), 60)
        recovery = time.monotonic() - killed
        time.sleep(seconds)
    outcome = Outcome(traffic.answers, recovery)
    bad = [answer for answer in traffic.answers if not answer.right]
    outcome.require(outcome.lost == 0, "no request is without an answer")
    outcome.require(all(answer.status and answer.status >= 500 for answer in bad), "what fails is a 5xx")
    outcome.require(len(bad) <= 4, "only requests inside the worker fail")
    outcome.require(all(answer.done - killed < 1 for answer in bad), "what fails is told so within a second")
    outcome.require(back and recovery < 10, "two workers are READY again in under 10 s")
    return outcome


def kill_only(stack: Stack, seconds: float) -> Outcome:
    scale(stack, "mnist", 1)
    [pid] = pids(stack, "mnist")
    with digits(stack) as traffic:
        time.sleep(seconds)
        killed = kill(stack, pid)
        back = eventually(lambda: whole(stack, "mnist", 1, {pid}), 60)
        recovery = time.monotonic() - killed
        time.sleep(seconds)
    scale(stack, "mnist", 2)
    outcome = Outcome(traffic.answers, recovery)
    outcome.require(outcome.lost == 0, "no request is without an answer")
    outcome.require(all(answer.seconds < DEADLINE for answer in traffic.answers), "every answer is within its deadline")
    outcome.require(outcome.failed <= 4, "only requests inside the worker fail; others wait or are told when to come")
    outcome.require(back, "the worker is READY again without a person")
    return outcome


def bad_archive(stack: Stack, seconds: float) -> Outcome:
    """Registered by hand, and rolled out."""
    with tempfile.TemporaryDirectory() as temporary:
        good = shipped(stack, "mnist", Path(temporary))
        bad = reversioned(good, "9.0", Path(temporary) / "bad.mar", without="index_to_name.json")
        put(stack, bad)
        with digits(stack) as traffic, texts(stack, "text", RATE / 4) as others:
            time.sleep(seconds)
            asked = requests.post(
                f"{stack.url('MANAGEMENT_PORT')}/models", params={"url": "bad.mar", "model_name": "mnist"}, timeout=150
            )
            default = stack.client.describe("mnist")["modelVersion"]
            rolled = stack.roll_out("mnist", bad)
            time.sleep(seconds)
    outcome = Outcome(traffic.answers + others.answers)
    outcome.require(outcome.answered == len(outcome.answers), "the models that are served do not notice")
    outcome.require(not asked.ok, "the registration is refused")
    outcome.require(default == stack.client.describe("mnist")["modelVersion"] == "1.0", "it never becomes the default")
    outcome.require(rolled.returncode != 0, "the rollout is refused")
    outcome.require("index_to_name.json" in rolled.stdout + rolled.stderr, "the message names the cause")
    return outcome


def give_up(stack: Stack, seconds: float) -> Outcome:
    """The unpacked model loses its weights, then its workers; after a restart it is unpacked again."""
    with faulty(stack, settings="maxRetryTimeoutInSec: 1"):
        restarts = stack.inspect()["RestartCount"]
        remove = "rm $(dirname $(ls /tmp/torchserve-*/models/*/faulty.py))/model.pt"
        with texts(stack, "faulty", RATE / 3) as traffic:
            time.sleep(seconds)
            stack.execute("sh", "-c", remove)
            for pid in pids(stack, "faulty"):
                killed = kill(stack, pid)
            restarted = eventually(lambda: stack.inspect()["RestartCount"] > restarts, 180)
            gave_up = given_up(docker("logs", stack.container()), "faulty")
            back = restarted and eventually(lambda: whole(stack, "faulty", 2), 180)
            back = back and eventually(lambda: requests.get(f"{stack.url('PORT')}/ping", timeout=10).ok, 60)
            recovery = time.monotonic() - killed
            time.sleep(seconds)
    outcome = Outcome(traffic.answers, recovery)
    outcome.require(gave_up == 2, "TorchServe tries neither worker again")
    outcome.require(restarted, "it is noticed, and the container starts anew")
    outcome.require(bool(back), "every worker is READY again without a person")
    outcome.require(outcome.lost == 0, "no request is queued for ever")
    outcome.require(all(answer.seconds < DEADLINE for answer in traffic.answers), "every answer is within its deadline")
    outcome.require(all(answer.right for answer in since(traffic.answers, killed + recovery + 1)), "and it serves")
    return outcome


def given_up(log: str, model: str) -> int:
    """How many workers died and were not tried again: TorchServe logs each death, and each retry."""
    told = [line for line in log.splitlines() if f"-{model}_" in line]
    deaths = sum("Auto recovery start timestamp" in line or "Auto recovery failed again" in line for line in told)
    return deaths - sum("Retry worker" in line for line in told)


def crash(stack: Stack, seconds: float) -> Outcome:
    """Behind the proxy, which sends what was answered 500 once more, and so to another worker, too."""
    with faulty(stack, workers=3) as url:
        before = pids(stack, "faulty")
        with texts(stack, "faulty", RATE / 2) as traffic, digits(stack, RATE / 2) as others:
            time.sleep(seconds)
            began = time.monotonic()
            answer = requests.post(url, data=b"crash", timeout=60)
            took = time.monotonic() - began
            eventually(lambda: not whole(stack, "faulty", 3), 5)
            back = eventually(lambda: whole(stack, "faulty", 3), 60)
            recovery = time.monotonic() - began
            time.sleep(seconds)
        replaced = len(before - pids(stack, "faulty"))
    outcome = Outcome(traffic.answers + others.answers, recovery)
    outcome.notes.append(
        f"the request that crashes: {answer.status_code} after {took:.1f} s; {replaced} of 3 workers replaced"
    )
    outcome.require(answer.status_code >= 500, "the request that crashes its worker is answered with 5xx")
    outcome.require(1 <= replaced <= 2, "it ends two workers at most, and the third goes on")
    outcome.require(back and recovery < 15, "all workers are READY again in under 15 s")
    outcome.require(outcome.lost == 0, "no request is without an answer")
    outcome.require(outcome.failed <= 4, "of its neighbours, few fail with it: those that shared both batches")
    outcome.require(all(a.right or a.refused for a in others.answers), "of other models, none fails")
    return outcome


def hang(stack: Stack, seconds: float) -> Outcome:
    with faulty(stack) as url:
        before = pids(stack, "faulty")
        with texts(stack, "faulty", 5) as traffic, digits(stack) as others:
            time.sleep(seconds)
            began = time.monotonic()
            answer = requests.post(url, data=b"hang", timeout=60)
            took = time.monotonic() - began
            back = eventually(lambda: len(pids(stack, "faulty") - before) == 1 and whole(stack, "faulty", 2), 60)
            recovery = time.monotonic() - began
            time.sleep(seconds)
    outcome = Outcome(traffic.answers + others.answers, recovery)
    outcome.notes.append(f"the request that hangs: {answer.status_code} after {took:.1f} s")
    outcome.require(answer.status_code == 504 and took < DEADLINE, "the request ends with 504 at its deadline")
    outcome.require(back, "its worker is replaced")
    outcome.require(outcome.lost == 0, "no request is without an answer")
    outcome.require(all(answer.right for answer in others.answers), "other models do not notice")
    outcome.require(sum(not answer.right for answer in traffic.answers) <= 2, "only its own batch fails with it")
    return outcome


def device(stack: Stack, seconds: float) -> Outcome:
    """Simulated: a batch does not fit; then the device is broken."""
    with faulty(stack) as url:
        crowds: list[Answer] = []
        for _ in range(10):
            for _ in range(4):  # either worker takes it
                requests.post(url, data=b"small transfer", timeout=30)
            with texts(stack, "faulty", 400) as crowd:
                time.sleep(1)
            crowds += crowd.answers
            if halved := "do not fit" in stack.execute("sh", "-c", "cat /tmp/run/logs/model_log.log"):
                break
        with texts(stack, "faulty", RATE) as traffic:
            time.sleep(seconds)
            before = pids(stack, "faulty")
            broke = time.monotonic()
            answer = requests.post(url, data=b"break", timeout=30)
            eventually(lambda: not whole(stack, "faulty", 2), 5)
            back = eventually(lambda: whole(stack, "faulty", 2), 60)
            recovery = time.monotonic() - broke
            time.sleep(seconds)
        replaced = len(before - pids(stack, "faulty"))
    outcome = Outcome(crowds + traffic.answers, recovery)
    outcome.notes.append(f"the request that breaks the device: {answer.status_code}; workers replaced: {replaced}")
    outcome.require(halved, "a batch that does not fit is halved")
    outcome.require(all(answer.right for answer in crowds), "a batch that does not fit is answered all the same")
    outcome.require(answer.status_code >= 500 and replaced >= 1, "a broken device ends the worker")
    outcome.require(back, "and it comes back")
    outcome.require(outcome.lost == 0, "no request is without an answer")
    return outcome


TRIALS = (
    Trial(
        "kill-one",
        "`kill -9` of one of two workers",
        "only requests inside it fail, with 5xx and within a second; two workers again in under 10 s",
        kill_one,
    ),
    Trial(
        "kill-only",
        "`kill -9` of the only worker",
        "requests wait or are told when to come again, none past its deadline; READY again without a person",
        kill_only,
    ),
    Trial(
        "bad-archive",
        "a worker that cannot start: a bad archive is registered, and rolled out",
        "it never becomes the default; the others do not notice; the message names the cause",
        bad_archive,
    ),
    Trial(
        "give-up",
        "TorchServe's own give-up (`maxRetryTimeoutInSec`): workers that do not come back",
        "it is noticed and healed by a restart; no request is queued for ever",
        give_up,
    ),
    Trial(
        "hang",
        "a handler that hangs",
        "the request ends with 504 at its deadline, the worker is replaced, others do not notice",
        hang,
    ),
    Trial(
        "crash",
        "a request that crashes its worker",
        "it is answered with 5xx, and ends two of three workers at most, which are READY again in under 15 s; of its "
        "neighbours, four fail at most; of other models' requests, none",
        crash,
    ),
    Trial(
        "device",
        "out of GPU memory, then a broken GPU (both simulated)",
        "the batch is halved and answered; the broken worker ends and comes back",
        device,
    ),
)
