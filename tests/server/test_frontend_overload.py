"""The frontend's patches `overload` and `forms`: what a client that is rejected, or that sends a form, sees."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.bare import Bare, bare
from tests.support import wait_for

MODELS = {
    "small": {"batchSize": 1, "maxBatchDelay": 1, "jobQueueSize": 2},
    "none": {"batchSize": 1, "maxBatchDelay": 1},
    "broken": {"batchSize": 1, "maxBatchDelay": 1, "maxRetryTimeoutInSec": 1},
}
PHOTO = bytes(range(256)) * 64
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with bare(tmp_path_factory.mktemp("patched"), MODELS) as server:
        yield server


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with bare(tmp_path_factory.mktemp("stock"), {"small": MODELS["small"]}, off="overload forms") as server:
        yield server


def beyond_the_queue(server: Bare) -> requests.Response:
    """Return the answer to a request that finds the queue full."""
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(server.post, "small", b"sleep 3")
        time.sleep(0.7)
        queued = [pool.submit(server.post, "small") for _ in range(2)]
        time.sleep(0.7)
        answer = server.post("small")
        assert [future.result().status_code for future in (busy, *queued)] == [200] * 3
    return answer


def error(answer: requests.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["type"], answer.headers.get("Retry-After")


def test_request_beyond_the_queue_is_429_with_retry_after(patched: Bare):
    answer = beyond_the_queue(patched)
    assert error(answer) == (429, "QueueFull", "1")
    assert answer.json()["message"] == 'The queue of model "small" is full: 2 requests wait. Retry later.'


def test_model_without_workers_is_503_with_retry_after(patched: Bare):
    patched.scale("none", 0)
    answer = patched.post("none")
    assert error(answer) == (503, "NoWorkers", "10")
    assert answer.json()["message"] == 'The model "none" has no workers. Retry later.'


def test_model_whose_workers_fail_at_each_start_is_503_with_retry_after(patched: Bare):
    patched.break_workers()
    for pid in patched.workers("broken"):
        os.kill(pid, 9)
    waiting = patched.post("broken")  # queued before TorchServe gives up
    assert waiting.status_code == 503, waiting.text
    wait_for(lambda: "fail at each start" in patched.post("broken").text, 120)
    assert error(patched.post("broken")) == (503, "NoWorkers", "10")


def test_body_that_curl_calls_a_form_arrives_whole(patched: Bare):
    answer = patched.post("small", PHOTO, headers={"Content-Type": FORM})
    assert answer.json()["fields"] == {"body": str(PHOTO)}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"a=1&b=x%20y", {"a": str(b"1"), "b": str(b"x y")}),
        (b"text=100 Euro", {"text": str(b"100 Euro")}),
        (b'{"text": "a=b"}', {"body": "{'text': 'a=b'}"}),
        (b"[1, 2]", {"body": "[1, 2]"}),
        (b"plain words", {"body": str(b"plain words")}),
        (b"\xff\xd8=&%", {"body": str(b"\xff\xd8=&%")}),
        (b"", {}),
    ],
    ids=str,
)
def test_form_is_decoded_and_any_other_body_is_raw(patched: Bare, body: bytes, fields: dict):
    assert patched.post("small", body, headers={"Content-Type": FORM}).json()["fields"] == fields


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"text=100%", FORM), (b"--b\r\nfoo\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b")],
)
def test_form_that_does_not_decode_is_400(patched: Bare, body: bytes, kind: str):
    answer = patched.post("small", body, headers={"Content-Type": kind})
    assert error(answer) == (400, "InvalidForm", None), answer.text


def test_full_queue_and_photo_without_the_patches(stock: Bare):
    answer = beyond_the_queue(stock)
    assert error(answer) == (503, "ServiceUnavailableException", None)
    photo = stock.post("small", PHOTO, headers={"Content-Type": FORM})
    assert error(photo) == (500, "ErrorDataDecoderException", None)
    assert "has no worker" in answer.json()["message"]
