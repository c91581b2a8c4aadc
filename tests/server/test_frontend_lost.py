"""The frontend's patches `lost` and `timeouts`: every request is answered, whatever happens to its worker."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import grpc
import pytest
import requests

from bundle.server import grpc_client
from bundle.server.grpc_client import GrpcError, predict
from tests.server.bare import Bare
from tests.support import wait_for
from tests.traffic import Traffic


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


def test_request_inside_a_killed_worker_is_answered_by_the_next(patched: Bare, pool):
    with patched.holding("one"):
        inside, queued = patched.posted(pool, "one", b"hold", b"x")
        [killed] = patched.workers("one")
        kill(patched, "one")
    assert inside.result().status_code == 200, inside.result().text
    assert inside.result().json()["worker"] == queued.result().json()["worker"] != killed


def test_request_inside_a_killed_worker_is_answered_although_the_queue_is_full(patched: Bare, pool):
    with patched.holding("one"):
        sent = patched.posted(pool, "one", b"hold", b"x", b"x")
        kill(patched, "one")
        time.sleep(0.3)  # TorchServe notices it meanwhile
        assert error(patched.post("one")) == (429, "QueueFull", "1")
    assert [future.result().status_code for future in sent] == [200] * 3


def test_request_whose_second_worker_is_scaled_down_is_503_with_retry_after(patched: Bare, pool):
    with patched.holding("one"):
        [inside] = patched.posted(pool, "one", b"hold")
        kill(patched, "one")
        wait_for(lambda: len(patched.held("one")) == 2)
        patched.scale("one", 0)
        assert error(inside.result()) == (503, "WorkerDied", "1")
    patched.restore("one")


def test_answer_that_cannot_be_sent_fails_alone(patched: Bare, pool):
    workers = patched.workers("batches")
    with requests.Session() as connection:
        url = f"{patched.inference}/predictions/batches"
        with patched.holding("batches"):
            [busy] = patched.posted(pool, "batches", b"hold")
            first = pool.submit(connection.post, url, b"first", timeout=60)
            wait_for(lambda: patched.accepted("batches") == 2)
            others = patched.posted(pool, "batches", b"header", b"x")
        assert busy.result().status_code == first.result().status_code == 200
        assert error(others[0].result()) == (500, "InvalidAnswer", None)
        assert others[1].result().status_code == 200
        second = connection.post(url, b"second", timeout=60)
    assert second.json()["fields"] == {"body": str(b"second")}, "the first answer came twice"
    assert patched.workers("batches") == workers


def test_streamed_answer_whose_worker_ends_is_not_repeated(patched: Bare):
    messages, service = grpc_client._stubs()
    request = messages.PredictionsRequest(model_name="two", input={"data": b"part"})
    with grpc.insecure_channel(patched.grpc) as channel:
        answers = service.InferenceAPIsServiceStub(channel).StreamPredictions(request, timeout=60)
        assert next(answers).prediction == b"part"
        with pytest.raises(grpc.RpcError) as failed:
            next(answers)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE


def test_request_that_ends_its_worker_ends_two_and_fails_alone(patched: Bare, pool):
    before = patched.exits()
    with patched.holding("batches"):
        busy, *batch = patched.posted(pool, "batches", b"hold", b"x", b"exit", b"x", b"x")
    assert busy.result().status_code == 200
    answers = [future.result() for future in batch]
    died = answers.pop(1)
    assert error(died) == (500, "WorkerDied", None)
    assert "Do not send it again." in died.json()["message"]
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
    assert [answer.json()["batch"] for answer in answers] == [1] * 3
    assert len(patched.exits() - before) == 2


def test_requests_of_a_worker_that_is_scaled_down_are_answered_by_the_other(patched: Bare, pool):
    with patched.holding("two"):
        sent = patched.posted(pool, "two", b"hold", b"hold", b"x")
        patched.scale("two", 1)
    answers = [future.result() for future in sent]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["worker"] for answer in answers}) == 1  # the one that stayed
    patched.restore("two")


def test_every_request_of_a_model_that_loses_its_workers_is_503_at_once(patched: Bare, pool):
    with patched.holding("one"):
        sent = patched.posted(pool, "one", b"hold", b"x")
        scaled = time.monotonic()
        patched.scale("one", 0)
        answers = [future.result() for future in sent]
    assert [error(answer) for answer in answers] == [(503, "NoWorkers", "1")] * 2
    assert time.monotonic() - scaled < 30  # the least of the server's timeouts is 60 s
    answer = patched.post("one")
    assert error(answer) == (503, "NoWorkers", "10")
    assert answer.json()["message"] == 'The model "one" has no workers. Retry later.'
    with pytest.raises(GrpcError, match='UNAVAILABLE: The model "one" has no workers.'):
        predict(patched.grpc, "one", b"x")
    patched.restore("one")


def test_request_that_was_only_collected_for_a_killed_worker_is_answered_by_the_next(patched: Bare, pool):
    collected = pool.submit(patched.post, "patient")
    time.sleep(0.5)
    kill(patched, "patient")
    assert collected.result().status_code == 200


def test_request_beyond_the_client_timeout_is_504_at_once_and_not_computed_later(patched: Bare, pool):
    with patched.holding("late"):
        start = time.monotonic()
        inside = pool.submit(patched.post, "late", b"hold")
        wait_for(lambda: patched.held("late") or inside.done())
        queued = pool.submit(patched.post, "late", b"sleep 60")
        assert error(inside.result()) == error(queued.result()) == (504, "ClientTimeout", "1")
        assert time.monotonic() - start > 0.9
    wait_for(lambda: patched.post("late").status_code == 200, 40)


def test_grpc_request_beyond_the_client_timeout_is_deadline_exceeded_at_once(patched: Bare, pool):
    def call(body: bytes) -> str:
        with pytest.raises(GrpcError) as failed:
            predict(patched.grpc, "late", body, timeout=50)
        return str(failed.value)

    def is_answered(body: bytes) -> bool:
        with suppress(GrpcError):
            return bool(predict(patched.grpc, "late", body, timeout=50))
        return False

    wait_for(lambda: is_answered(b"x"))
    with patched.holding("late"):
        start = time.monotonic()
        inside = pool.submit(call, b"hold")
        wait_for(lambda: patched.held("late") or inside.done())
        queued = pool.submit(call, b"sleep 60")
        for future in (inside, queued):
            assert "DEADLINE_EXCEEDED: There was no answer within the model's clientTimeoutInMills" in future.result()
        assert time.monotonic() - start > 0.9
    wait_for(lambda: is_answered(b"sleep 0.5"), 40)


def test_request_whose_worker_does_not_answer_in_time_is_504(patched: Bare):
    assert error(patched.post("stuck", b"sleep 20")) == (504, "WorkerTimeout", "1")


def test_every_request_is_answered_200_while_workers_are_scaled_and_killed(patched: Bare):
    url = f"{patched.inference}/predictions/two"
    with Traffic(url, b"sleep 0.02", '"batch"', clients=8, pause=0, keeps=False) as load:
        load.wait_for(50)
        kill(patched, "two")
        load.wait_for(50)
        patched.scale("two", 1)
        load.wait_for(50)
    assert set(load.counts) == {200}, load.counts
    patched.restore("two")


def test_requests_are_lost_without_the_patches(unpatched: Bare, pool):
    def is_lost(request: Future) -> bool:
        try:
            return not request.result()
        except requests.ReadTimeout:
            return True

    def is_lost_with_its_worker() -> bool:
        """Answer False if the worker was killed too late: after its answer."""
        collected = pool.submit(unpatched.post, "batches", timeout=6)
        time.sleep(0.5)
        kill(unpatched, "batches")
        return is_lost(collected)

    with unpatched.holding("one"), unpatched.holding("late"):
        _, queued = unpatched.posted(pool, "one", b"hold", b"x", timeout=6)
        [late] = unpatched.posted(pool, "late", b"hold", timeout=6)
        unpatched.scale("one", 0)
        assert is_lost(queued)
        assert is_lost(late)
    assert any(is_lost_with_its_worker() for _ in range(5))
    unpatched.restore("one")


def test_requests_that_do_not_wait_for_the_answer_before_are_all_answered(patched: Bare):
    """TorchServe takes the id of a second request away when it answers the first one, and then forgets the second."""
    request = b"POST /predictions/one HTTP/1.1\r\nHost: x\r\n%sContent-Length: 1\r\n\r\nx"
    sent = request % b"" + request % b"Connection: close\r\n"
    address = urlsplit(patched.inference)
    for _ in range(1500):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.makefile("rb").read().count(b"HTTP/1.1 200") == 2
