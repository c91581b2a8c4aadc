"""The frontend's patches `overload` and `forms`: what a client that is rejected, or that sends a form, sees."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from bundle.server.grpc_client import GrpcError, predict
from tests.server.bare import Bare
from tests.support import wait_for

PHOTO = bytes(range(256)) * 64
TENSOR = {"name": "data", "datatype": "BYTES", "shape": [1], "data": ["x"]}
FORM = "application/x-www-form-urlencoded"


@contextmanager
def full_queue(server: Bare) -> Iterator[None]:
    """Keep the queue of the model `one` full while the block runs."""
    predict(server.grpc, "one", b"x")  # its first call compiles the protocol, which takes a while
    with ThreadPoolExecutor(3) as pool:
        with server.holding("one"):
            sent = server.posted(pool, "one", b"hold", b"x", b"x")
            yield
        assert [future.result().status_code for future in sent] == [200] * 3


def error(answer: requests.Response) -> tuple[int, str, str | None]:
    return answer.status_code, answer.json()["type"], answer.headers.get("Retry-After")


def test_request_beyond_the_queue_is_429_with_retry_after(patched: Bare):
    with full_queue(patched):
        answer = patched.post("one")
        with pytest.raises(GrpcError, match='RESOURCE_EXHAUSTED: The queue of model "one" is full'):
            predict(patched.grpc, "one", b"x")
        open_inference = requests.post(
            f"{patched.inference}/v2/models/one/infer", json={"inputs": [TENSOR]}, timeout=60
        )
        with triton.InferenceServerClient(patched.inference.removeprefix("http://")) as client:
            tensor = triton.InferInput("data", [1], "BYTES").set_data_from_numpy(numpy.array([b"x"], numpy.object_))
            with pytest.raises(InferenceServerException, match='The queue of model "one" is full') as raised:
                client.infer("one", [tensor])
    assert raised.value.status() == "429"
    assert (open_inference.status_code, open_inference.headers["Retry-After"]) == (429, "1")
    assert open_inference.json() == {"error": answer.json()["message"]}
    assert error(answer) == (429, "QueueFull", "1")
    assert answer.json()["message"] == 'The queue of model "one" is full: 2 requests wait. Retry later.'


def test_request_beyond_the_queue_is_not_counted_as_a_timeout_later(patched: Bare):
    def failures() -> int:
        return sum(log.read_text().count("Requests5XX.Count:1") for log in patched.folder.rglob("*.log"))

    before = failures()
    with ThreadPoolExecutor(3) as pool:
        with patched.holding("later"):
            sent = patched.posted(pool, "later", b"hold", b"x", b"x")
            assert patched.post("later").status_code == 429
        assert [future.result().status_code for future in sent] == [200] * 3
    time.sleep(5.2)  # longer than clientTimeoutInMills
    assert failures() == before


def test_model_whose_workers_fail_at_each_start_is_503_with_retry_after(patched: Bare):
    patched.break_workers("broken")
    [pid] = patched.workers("broken")
    os.kill(pid, 9)
    waiting = patched.post("broken")  # queued before TorchServe gives up
    assert waiting.status_code == 503, waiting.text
    wait_for(lambda: "have not started within maxRetryTimeoutInSec" in patched.post("broken").text, 120)
    assert error(patched.post("broken")) == (503, "NoWorkers", "10")


def test_failed_batch_is_500(patched: Bare):
    answer = patched.post("one", b"raise")
    assert error(answer) == (500, "InternalServerException", None)
    with pytest.raises(GrpcError, match="INTERNAL: Prediction failed"):
        predict(patched.grpc, "one", b"raise")


def test_body_that_curl_calls_a_form_arrives_whole(patched: Bare):
    answer = patched.post("one", PHOTO, headers={"Content-Type": FORM})
    assert answer.json()["fields"] == {"body": str(PHOTO)}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"a=1&b=x%20y", {"a": str(b"1"), "b": str(b"x y")}),
        (b"text=100 Euro", {"text": str(b"100 Euro")}),
        (b"text=100 \x80&b=%80", {"text": str(b"100 \x80"), "b": str(b"\x80")}),
        (b"100 \x80=x", {"body": str(b"100 \x80=x")}),
        (b'{"text": "a=b"}', {"body": "{'text': 'a=b'}"}),
        (b"[1, 2]", {"body": "[1, 2]"}),
        (b"plain words", {"body": str(b"plain words")}),
        (b"\xff\xd8=&%", {"body": str(b"\xff\xd8=&%")}),
        (b"", {}),
    ],
    ids=str,
)
def test_form_is_decoded_and_any_other_body_is_raw(patched: Bare, body: bytes, fields: dict):
    assert patched.post("one", body, headers={"Content-Type": FORM}).json()["fields"] == fields


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"text=100%", FORM), (b"--b\r\nfoo\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b")],
)
def test_form_that_does_not_decode_is_400(patched: Bare, body: bytes, kind: str):
    answer = patched.post("one", body, headers={"Content-Type": kind})
    assert error(answer) == (400, "InvalidForm", None), answer.text


def test_full_queue_failed_batch_and_photo_without_the_patches(unpatched: Bare):
    with full_queue(unpatched):
        answer = unpatched.post("one")
        with pytest.raises(GrpcError, match="INTERNAL"):
            predict(unpatched.grpc, "one", b"x")
    assert error(answer) == (503, "ServiceUnavailableException", None)
    assert "has no worker" in answer.json()["message"]
    assert unpatched.post("one", b"raise").status_code == 503
    photo = unpatched.post("one", PHOTO, headers={"Content-Type": FORM})
    assert error(photo) == (500, "ErrorDataDecoderException", None)
