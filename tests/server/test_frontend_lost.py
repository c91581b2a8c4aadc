"""The frontend's patches `lost` and `timeouts`: every request is answered, whatever happens to its worker."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests

from tests.server.bare import Bare, bare
from tests.support import wait_for

PLAIN = {"batchSize": 1, "maxBatchDelay": 1}
MODELS = {
    "one": PLAIN,
    "two": {**PLAIN, "minWorkers": 2, "maxWorkers": 2},
    "gone": PLAIN,
    "patient": {"batchSize": 4, "maxBatchDelay": 3000, "patience": "fixed"},
    "late": {**PLAIN, "clientTimeoutInMills": 1000},
    "stuck": {**PLAIN, "responseTimeout": 2},
}
STOCK = {name: MODELS[name] for name in ("gone", "patient", "late")}


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with bare(tmp_path_factory.mktemp("patched"), MODELS) as server:
        yield server


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with bare(tmp_path_factory.mktemp("stock"), STOCK, off="lost timeouts") as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def error(answer: requests.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["type"], answer.headers.get("Retry-After")


def kill(server: Bare, model: str) -> None:
    """Kill a model's first worker, if it is not just being restarted."""
    with suppress(ProcessLookupError):
        os.kill(server.workers(model)[0], signal.SIGKILL)


def posted(server: Bare, pool: ThreadPoolExecutor, model: str, *bodies: bytes, **options: float) -> list[Future]:
    """Send requests, and wait until the first is in the worker and the others are in the queue."""
    sent = [pool.submit(server.post, model, bodies[0], **options)]
    time.sleep(0.7)
    sent += [pool.submit(server.post, model, body, **options) for body in bodies[1:]]
    time.sleep(0.7)
    return sent


def test_request_inside_a_killed_worker_is_answered_by_the_next(patched: Bare, pool):
    inside, queued = posted(patched, pool, "one", b"sleep 3", b"x")
    [killed] = patched.workers("one")
    kill(patched, "one")
    assert inside.result().status_code == 200, inside.result().text
    assert inside.result().json()["worker"] == queued.result().json()["worker"] != killed


def test_request_that_ends_its_worker_is_repeated_once_and_then_503(patched: Bare, pool):
    inside, queued = posted(patched, pool, "one", b"exit", b"x")
    assert error(inside.result()) == (503, "WorkerDied", "1")
    assert queued.result().status_code == 200


def test_requests_of_a_worker_that_is_scaled_down_are_answered_by_the_other(patched: Bare, pool):
    inside = posted(patched, pool, "two", b"sleep 3", b"sleep 3", b"sleep 0")
    patched.scale("two", 1)
    answers = [future.result() for future in inside]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["worker"] for answer in answers}) == 1  # the one that stayed
    patched.scale("two", 2)


def test_every_request_of_a_model_that_loses_its_workers_is_503_at_once(patched: Bare, pool):
    sent = posted(patched, pool, "gone", b"sleep 20", b"x", b"x")
    scaled = time.monotonic()
    patched.scale("gone", 0)
    answers = [future.result() for future in sent]
    assert [error(answer) for answer in answers] == [(503, "NoWorkers", "1")] * 3
    assert time.monotonic() - scaled < 10


def test_request_that_was_only_collected_for_a_killed_worker_is_answered_by_the_next(patched: Bare, pool):
    [collected] = posted(patched, pool, "patient", b"x")
    kill(patched, "patient")
    assert collected.result().status_code == 200


def test_request_beyond_the_client_timeout_is_504_at_once(patched: Bare):
    start = time.monotonic()
    assert error(patched.post("late", b"sleep 8")) == (504, "ClientTimeout", "1")
    assert 0.9 < time.monotonic() - start < 6
    wait_for(lambda: patched.post("late").status_code == 200, 20)


def test_request_in_the_queue_beyond_the_client_timeout_is_504_and_is_not_computed(patched: Bare, pool):
    sent = posted(patched, pool, "late", b"sleep 3", b"sleep 60")
    assert [error(future.result()) for future in sent] == [(504, "ClientTimeout", "1")] * 2
    wait_for(lambda: patched.post("late").status_code == 200, 20)


def test_request_whose_worker_does_not_answer_in_time_is_504(patched: Bare):
    assert error(patched.post("stuck", b"sleep 20")) == (504, "WorkerTimeout", "1")


def test_no_request_is_lost_while_workers_are_scaled_and_killed(patched: Bare, pool):
    stop = time.monotonic() + 20

    def client(_: int) -> list[int]:
        statuses = []
        while time.monotonic() < stop:
            statuses.append(patched.post("two", b"sleep 0.02").status_code)
        return statuses

    clients = [pool.submit(client, number) for number in range(8)]
    for _ in range(2):
        patched.scale("two", 1)
        patched.scale("two", 2)
        kill(patched, "two")
        time.sleep(1)
    statuses = [status for future in clients for status in future.result()]
    assert set(statuses) <= {200, 503}
    assert statuses.count(503) <= 2  # a request whose second worker was killed, too
    assert statuses.count(200) > 20


@pytest.mark.parametrize("model", ["gone", "patient", "late"])
def test_request_is_lost_without_the_patches(stock: Bare, pool, model: str):
    bodies = {"gone": (b"sleep 5", b"x"), "patient": (b"x",), "late": (b"sleep 3",)}[model]
    *_, last = posted(stock, pool, model, *bodies, timeout=12)
    if model == "gone":
        stock.scale(model, 0)
    elif model == "patient":
        kill(stock, model)
    with pytest.raises(requests.ReadTimeout):
        last.result()
