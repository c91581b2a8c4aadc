"""The frontend's patches `drain`, `management`, `registration`, `gzip` and `oversized`."""

import gzip
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import psutil
import pytest
import requests
from google.protobuf.empty_pb2 import Empty
from requests.adapters import HTTPAdapter

from bundle.server import grpc_client
from bundle.supervisor.gate import own_addresses
from tests.server.bare import ONE_THREAD, PLAIN, Bare, archive, bare
from tests.support import wait_for

LARGE = bytes(7 * 2**20)  # TorchServe's default limit is 6.25 MiB
BODY = 16 << 20
MULTIPART = "multipart/form-data; boundary=b"
PART = b"--b\r\nContent-Disposition: form-data; name=a"
FILE = b"--c\r\nContent-Disposition: attachment; filename=a\r\n\r\n\r\n"


def filled(before: bytes, repeated: bytes, after: bytes) -> bytes:
    """Return a body of 16 MiB, or a few bytes less."""
    return before + repeated * ((BODY - len(before) - len(after)) // len(repeated)) + after


# kind, body, words of the rejection
FORMS = {
    "fields": ("application/x-www-form-urlencoded", filled(b"a=", b"&a", b""), "more than 1,000 fields"),
    "parts": (MULTIPART, filled(b"", PART + b"\r\n\r\n\r\n", b"--b--\r\n"), "more than 1,000 fields"),
    "nested parts": (
        MULTIPART,
        filled(PART + b"\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n", FILE, b"--c--\r\n--b--\r\n"),
        "more than 1,000 fields",
    ),
    "parameters": (MULTIPART, filled(PART, b";a=b", b"\r\n\r\nx\r\n--b--\r\n"), "more than 10,000 parameters"),
}


def answers_during_a_registration(server: Bare, seconds: float) -> bool:
    """Return whether a prediction is answered in time while a registration waits for the worker of its model."""
    archive(server.folder / "store", "slow")
    query = {"url": "slow.mar", "initial_workers": 1, "synchronous": "true"}
    with ThreadPoolExecutor(1) as pool:
        with server.holding("slow", "start"):
            registered = pool.submit(requests.post, f"{server.management}/models", params=query, timeout=120)
            wait_for(lambda: server.held("slow", "start"))
            try:
                answered = server.post("one", timeout=seconds).status_code == 200
            except requests.ReadTimeout:
                answered = False
        assert registered.result().status_code == 200, registered.result().text
    assert requests.delete(f"{server.management}/models/slow", timeout=30).status_code == 200
    return answered


def terminate_while_busy(server: Bare) -> list[int | str]:
    """Send SIGTERM while a request is in the worker and two are in the queue; return what their clients saw."""

    def outcome(sent: Future) -> int | str:
        try:
            return sent.result().status_code
        except requests.ConnectionError:
            return "no answer"

    def is_closed() -> bool:
        try:
            requests.get(f"{server.inference}/ping", timeout=30)
        except requests.ConnectionError:
            return True
        return False

    with ThreadPoolExecutor(3) as pool:
        with server.holding("one"):
            sent = server.posted(pool, "one", b"hold", b"x", b"x")
            os.kill(server.process.pid, signal.SIGTERM)
            wait_for(is_closed)
            with pytest.raises(requests.ConnectionError):
                server.post("one")
        return [outcome(each) for each in sent]


def test_prediction_does_not_wait_for_a_registration(patched: Bare):
    assert answers_during_a_registration(patched, 30)


def test_gzip_body_arrives_decompressed(patched: Bare):
    text = b"a text" * 1000
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"}
    assert patched.post("one", gzip.compress(text), headers=headers).json()["fields"] == {"body": str(text)}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"a=1&b=2", "application/x-www-form-urlencoded"),
        (
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
            b'--b\r\nContent-Disposition: form-data; name="b"; filename="f"\r\n\r\n2\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
    ],
    ids=["form", "multipart"],
)
def test_gzip_form_arrives_in_its_fields(patched: Bare, body: bytes, kind: str):
    headers = {"Content-Encoding": "gzip", "Content-Type": kind}
    fields = patched.post("one", gzip.compress(body), headers=headers).json()["fields"]
    assert fields == {"a": str(b"1"), "b": str(b"2")}


def test_management_calls_of_one_connection_are_answered_in_their_order(patched: Bare):
    address = urlsplit(patched.management)
    slow = (
        b"PUT /models/one?min_worker=1&max_worker=1&synchronous=true HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    )
    quick = b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        for _ in range(20):
            connection.sendall(slow + quick)
            answers = b""
            while answers.count(b"HTTP/1.1 200") < 2 or not answers.rstrip().endswith(b"}"):
                answers += connection.recv(65536)
            assert answers.index(b"Workers scaled") < answers.index(b'"modelName"'), answers


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b"a text" * 1000)[:-20]], ids=["other", "cut"])
def test_body_that_is_no_gzip_is_400(patched: Bare, body: bytes):
    answer = patched.post("one", body, headers={"Content-Encoding": "gzip", "Content-Type": "text/plain"})
    assert answer.status_code == 400, answer.text
    assert "The body is not gzip" in answer.json()["message"]


def test_gzip_body_that_becomes_too_large_is_400(patched: Bare):
    body = gzip.compress(LARGE)
    answer = patched.post("one", body, headers={"Content-Encoding": "gzip", "Content-Type": "text/plain"})
    assert answer.status_code == 400, answer.text
    assert "The decompressed body has more than 6553500 bytes." in answer.json()["message"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (LARGE, {}),
        (LARGE, {"Connection": "close"}),
        (LARGE, {"Content-Type": "application/json"}),
        ((LARGE[start : start + 2**16] for start in range(0, len(LARGE), 2**16)), {}),
    ],
    ids=["kept alive", "closed", "JSON", "chunked"],
)
def test_body_over_the_limit_gets_413_that_names_the_limit(patched: Bare, body: bytes | Iterator[bytes], headers: dict):
    with requests.Session() as client:
        answer = client.post(f"{patched.inference}/predictions/one", body, headers=headers, timeout=20)
        assert (answer.status_code, answer.json()["type"]) == (413, "BodyTooLarge")
        assert answer.json()["message"] == "The body is larger than 6,553,500 bytes, the limit of max_request_size."
        assert client.post(f"{patched.inference}/predictions/one", b"x", timeout=20).status_code == 200


def test_client_that_asks_before_it_sends_too_much_gets_413(patched: Bare):
    address = urlsplit(patched.inference)
    asked = b"POST /predictions/one HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(asked % len(LARGE))
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"6,553,500" in answer
        connection.sendall(asked % 1)
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")
        connection.sendall(b"x")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("kind", ["files", "data"], ids=["multipart", "urlencoded"])
def test_form_may_have_a_thousand_fields(patched: Bare, kind: str):
    fields = {str(index): "x" for index in range(1001)}
    rejected = requests.post(f"{patched.inference}/predictions/one", **{kind: fields}, timeout=20)
    assert (rejected.status_code, "more than 1,000 fields" in rejected.json()["message"]) == (400, True)
    del fields["0"]
    answer = requests.post(f"{patched.inference}/predictions/one", **{kind: fields}, timeout=20)
    assert answer.json()["fields"].keys() == fields.keys()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A server with a heap of 1 GiB that accepts 16 MiB of body, and ends when the heap is full; one of 3 replicas."""
    settings = {"max_request_size": str(BODY), "prefer_direct_buffer": "false", **ONE_THREAD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_JAVA_OPTIONS", "-Xmx1g -XX:+ExitOnOutOfMemoryError")
        patch.setenv("BUNDLE_REPLICAS", "3")
        with bare(tmp_path_factory.mktemp("small"), {"one": PLAIN}, **settings) as server:
            yield server


class FromOutside(HTTPAdapter):
    """Connect from another address of this machine than its loopback."""

    def init_poolmanager(self, *arguments, **options):
        address = next(address for address in own_addresses() if not address.startswith("127."))
        super().init_poolmanager(*arguments, source_address=(address, 0), **options)


CHANGES = [("PUT", "/models/one?min_worker=1"), ("POST", "/models?url=no.mar"), ("DELETE", "/models/no")]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_change_of_one_of_several_replicas_from_outside_is_409(small: Bare, patched: Bare, method: str, path: str):
    with requests.Session() as outside, requests.Session() as inside:
        outside.mount("http://", FromOutside())
        refused = outside.request(method, small.management + path, timeout=60)
        assert (refused.status_code, refused.json()["type"]) == (409, "OneOfSeveralReplicas"), refused.text
        assert f'make manage CALL="{method} {path}"' in refused.json()["message"]
        assert outside.get(f"{small.management}/models", timeout=30).status_code == 200  # on the same connection
        # TorchServe's own answers: 202 for the workers, 404 for a model that does not exist
        passed = inside.request(method, small.management + path, timeout=60).status_code
        alone = outside.request(method, patched.management + path, timeout=60).status_code
        assert passed == alone == (202 if method == "PUT" else 404)


WRONG = {
    ("PUT", "/models/one?min_workers=3"): "There is no parameter min_workers. This call has: min_worker, max_worker, ",
    ("PUT", "/models/one/1.0?max_worker=3&min_worker=abc"): "min_worker must be an integer of at least 0, and is abc.",
    ("PUT", "/models/one?min_worker=-1"): "min_worker must be an integer of at least 0, and is -1.",
    ("POST", "/models?url=one.mar&workers=2"): "There is no parameter workers. This call has: url, model_name, ",
    ("POST", "/models?url=one.mar&batch_size=0"): "batch_size must be an integer of at least 1, and is 0.",
}


@pytest.mark.parametrize(("method", "path"), WRONG)
def test_wrong_parameter_of_a_management_call_is_400_and_changes_nothing(patched: Bare, method: str, path: str):
    client = patched.client()
    before = client.models(), client.workers("one")
    with requests.Session() as session:
        refused = session.request(method, patched.management + path, timeout=60)
        assert (refused.status_code, refused.json()["type"]) == (400, "InvalidParameter"), refused.text
        assert refused.json()["message"].startswith(WRONG[method, path])
        assert session.get(f"{patched.management}/models", timeout=30).status_code == 200  # on the same connection
    assert (client.models(), client.workers("one")) == before


def test_wrong_parameter_of_a_management_call_is_accepted_without_the_patch(unpatched: Bare):
    assert requests.put(f"{unpatched.management}/models/one?min_workers=3", timeout=60).status_code == 202


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ["predictions/one", "wfpredict/one"])
def test_form_of_millions_of_fields_leaves_memory_free(small: Bare, route: str, form: str):
    kind, body, message = FORMS[form]
    answer = requests.post(f"{small.inference}/{route}", body, headers={"Content-Type": kind}, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (400, "InvalidForm"), answer.text
    assert message in answer.json()["message"]
    assert small.post("one").status_code == 200


def test_registration_names_the_parameters_that_the_archive_overrides(patched: Bare):
    archive(patched.folder / "store", "more", batchSize=4)
    query = {"url": "more.mar", "initial_workers": 2, "response_timeout": 5, "batch_size": 8}
    answer = requests.post(f"{patched.management}/models", params=query, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == (
        'Model "more" Version: 1.0 registered with 1 initial workers; parameters without effect, because the '
        "archive's model-config.yaml sets other values: initial_workers=2 (1), response_timeout=5 (60)"
    )
    [described] = requests.get(f"{patched.management}/models/more", timeout=20).json()
    assert described["batchSize"] == 8  # TorchServe obeys this one
    assert requests.delete(f"{patched.management}/models/more", timeout=30).status_code == 200


def test_registration_that_fails_names_the_log(patched: Bare):
    archive(patched.folder / "store", "fails", maxRetryTimeoutInSec=1)
    patched.break_workers("fails")
    answer = requests.post(f"{patched.management}/models", params={"url": "fails.mar"}, timeout=120)
    assert answer.status_code == 500, answer.text
    assert "Failed to start workers for model fails version: 1.0. The server's log has" in answer.json()["message"]


def test_registration_large_and_gzip_bodies_without_the_patches(unpatched: Bare):
    answer = unpatched.post("one", LARGE)
    assert (answer.status_code, answer.content) == (413, b"")
    body = gzip.compress(b"a text")
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"}
    assert unpatched.post("one", body, headers=headers).json()["fields"] == {"body": str(body)}
    assert not answers_during_a_registration(unpatched, 3)


def test_sigterm_answers_the_grpc_calls_that_were_accepted_and_no_others(tmp_path: Path):
    messages, services = grpc_client._stubs()

    def request(body: bytes):
        return messages.PredictionsRequest(model_name="one", input={"data": body})

    with bare(tmp_path, {"one": PLAIN}) as server, grpc.insecure_channel(server.grpc) as channel:
        call = services.InferenceAPIsServiceStub(channel).Predictions
        assert call(request(b"x"), timeout=60).prediction
        accepted = []
        with server.holding("one"):
            for body in (b"hold", b"x"):
                accepted.append(call.future(request(body), timeout=120))
                wait_for(lambda: server.accepted("one") == len(accepted))
            os.kill(server.process.pid, signal.SIGTERM)
            wait_for(lambda: not answers_ping(channel))
            with pytest.raises(grpc.RpcError) as rejected:
                call(request(b"x"), timeout=60)
        assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
        assert all(future.result().prediction for future in accepted)
        _, alive = psutil.wait_procs([server.process], timeout=60)
    assert alive == []


def answers_ping(channel: grpc.Channel) -> bool:
    _, services = grpc_client._stubs()
    try:
        services.InferenceAPIsServiceStub(channel).Ping(Empty(), timeout=30)
    except grpc.RpcError:
        return False
    return True


def test_sigterm_answers_what_was_accepted_with_the_patch_only(tmp_path: Path):
    def terminated(off: str) -> list[int | str]:
        with bare(tmp_path / f"off-{off}", {"one": PLAIN}, off=off) as server:
            answers = terminate_while_busy(server)
            _, alive = psutil.wait_procs([server.process], timeout=60)
        assert alive == []
        return answers

    with ThreadPoolExecutor(2) as pool:
        patched, unpatched = pool.map(terminated, ["", "drain"])
    assert patched == [200] * 3
    assert "no answer" in unpatched
