"""What the proxy adds to requests, answers and its log, and which of TorchServe's errors it replaces."""

import time
import uuid

import pytest

from bundle.server.ports import free_ports
from tests.docker.proxy import PREDICT, check_error, eventually, http

# TorchServe's answer to a request for a model without workers: with the agent (bundle/frontend), and without it
NO_WORKERS = (
    b'{\n  "code": 503,\n  "type": "NoWorkers",\n  "message": "The model \\"mnist\\" has no workers. Retry later."\n}\n'
)
UNPATCHED = (
    b'{\n  "code": 503,\n  "type": "ServiceUnavailableException",\n  "message": "Model \\"mnist\\" has no worker to '
    b"serve inference request. Please use scale workers API to add workers. If this is a sequence inference, please "
    b'check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"\n}\n'
)

pytestmark = pytest.mark.usefixtures("fresh")


# -- ids, headers, logs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", ["a", "Trace_1.2-3", "x" * 64])
def test_valid_request_id_is_kept(proxy, upstream, own):
    status, headers, _ = proxy.raw(
        f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {own}\r\nContent-Length: 0\r\n\r\n"
    )
    assert (status, headers.get_all("X-Request-Id")) == (200, [own])
    assert upstream.received[0].headers.get_all("X-Request-Id") == [own]


@pytest.mark.parametrize("own", [None, "", "x" * 65, "a b", "a/b", "a;b", 'a"b', "\xe9"])
def test_missing_or_invalid_request_id_is_replaced(proxy, upstream, own):
    line = "" if own is None else f"X-Request-Id: {own}\r\n"
    status, headers, _ = proxy.raw(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n{line}Content-Length: 0\r\n\r\n")
    [generated] = headers.get_all("X-Request-Id")
    assert status == 200
    assert len(generated) == 32
    assert upstream.received[0].headers.get_all("X-Request-Id") == [generated]


def test_forwarding_headers_of_a_client_are_replaced_and_others_passed_on(proxy, upstream):
    before = time.time()
    proxy.post(
        headers={"X-Request-Start": "t=1", "X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "https", "X-Own": "1"}
    )
    headers = upstream.received[0].headers
    assert before - 0.01 <= float(headers["X-Request-Start"].removeprefix("t=")) <= time.time() + 0.01
    assert headers.get_all("X-Request-Start") == [headers["X-Request-Start"]]
    assert headers.get_all("X-Forwarded-For") == ["127.0.0.1"]
    assert headers.get_all("X-Forwarded-Proto") == ["http"]
    assert (headers["Host"], headers["X-Own"]) == ("127.0.0.1", "1")


@pytest.mark.parametrize("name", ["describe", "Describe", "DESCRIBE", "explain", "Explain", "EXPLAIN"])
def test_describe_and_explain_headers_are_removed(proxy, upstream, name):
    status, _, _ = proxy.raw(
        f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n{name}: True\r\n{name}: True\r\nContent-Length: 0\r\n\r\n"
    )
    assert (status, upstream.received[0].headers.get_all(name)) == (200, None)


def test_server_header_has_no_version(proxy):
    assert proxy.post().headers["Server"] == "nginx"


def test_access_log_has_a_json_line_for_each_request(proxy, upstream):
    mark = uuid.uuid4().hex
    proxy.post(f'{PREDICT}?q="\\', headers={"X-Request-Id": mark, "User-Agent": 'curl"\\\x01'})
    line = proxy.access_log(mark)
    assert line.keys() == {
        *("time", "request_id", "remote_address", "method", "uri", "status", "bytes"),
        *("request_time", "upstream_time", "upstream_status", "user_agent"),
    }
    assert (line["method"], line["status"], line["upstream_status"]) == ("POST", 200, "200")
    assert (line["request_id"], line["remote_address"]) == (mark, "127.0.0.1")
    assert line["uri"].startswith(f"{PREDICT}?q=")
    assert line["user_agent"] == 'curl"\\\x01'
    assert 0 <= float(line["upstream_time"]) <= line["request_time"] + 0.002  # each is rounded separately
    assert line["bytes"] > 100

    upstream.status, upstream.body = 503, NO_WORKERS
    mark = uuid.uuid4().hex
    proxy.post(headers={"X-Request-Id": mark})
    line = proxy.access_log(mark)
    assert (line["method"], line["uri"], line["status"], line["upstream_status"]) == ("POST", PREDICT, 503, "503")


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "Multipart/form-data; boundary=x"])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_and_its_content_type_pass_unchanged(proxy, upstream, content_type, chunked):
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = b"RIFF" + b"a" * 500_000 + b"\x00=&"
    assert proxy.post(data=iter([body]) if chunked else body, headers=headers).status_code == 200
    [received] = upstream.received
    assert (received.headers["Content-Type"], received.body) == (content_type, body)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 413, 429, 507])
def test_handler_error_passes_unchanged(proxy, upstream, status):
    upstream.status, upstream.headers = status, {"Content-Type": "application/json"}
    upstream.body = b'{"code": 413, "type": "ImageTooLarge", "message": "..."}'
    answer = proxy.post()
    assert (answer.status_code, answer.content) == (status, upstream.body)


def test_message_of_a_500_is_replaced(proxy, upstream):
    upstream.status, upstream.body = 500, b'{"message": "java.lang.NullPointerException: at io.netty.handler ..."}'
    answer = proxy.post()
    check_error(answer, 500, "PredictionFailed")
    assert "java" not in answer.text


@pytest.mark.parametrize("status", [500, 503, 504, 507])
def test_request_is_sent_once_whatever_the_answer(proxy, upstream, status):
    """TorchServe's frontend repeats those of a worker that ended."""
    upstream.first = status
    assert proxy.post().status_code == status
    assert len(upstream.received) == 1


@pytest.mark.parametrize(
    ("status", "own", "passed"),
    [(429, "7", "7"), (503, "10", "10"), (429, None, "1"), (503, None, "5"), (503, "x", "5"), (200, "7", None)],
)
def test_retry_after_is_that_of_the_server_or_a_default(proxy, upstream, status, own, passed):
    upstream.status, upstream.headers = status, {} if own is None else {"Retry-After": own}
    answer = proxy.post()
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, passed)


@pytest.mark.parametrize(("body", "own", "passed"), [(NO_WORKERS, "10", "10"), (UNPATCHED, None, "5")])
def test_503_of_the_server_passes_with_its_reason(proxy, upstream, body, own, passed):
    upstream.status, upstream.body = 503, body
    upstream.headers = {"Retry-After": own} if own else {}
    answer = proxy.post()
    assert (answer.status_code, answer.content, answer.headers["Retry-After"]) == (503, body, passed)


def test_504_of_the_server_keeps_its_retry_after(proxy, upstream):
    upstream.status, upstream.headers, upstream.body = 504, {"Retry-After": "1"}, b'{"type": "WorkerTimeout"}'
    check_error(proxy.post(), 504, "UpstreamTimeout", "1")


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_request_without_an_answer_is_sent_again_only_if_its_connection_was_a_kept_one(proxy, upstream, method):
    """The server may have closed a kept connection before the request came."""
    proxy.post()  # leaves a connection of one of the two worker processes
    upstream.received.clear()
    upstream.status = None
    for _ in range(8):
        check_error(http.request(method, proxy.url + PREDICT, data=b"x", timeout=10), 503, "ServerUnavailable", "5")
    assert len(upstream.received) <= 8 + 2
    eventually(lambda: upstream.open_connections == 0)
    upstream.received.clear()
    check_error(http.request(method, proxy.url + PREDICT, data=b"x", timeout=10), 503, "ServerUnavailable", "5")
    assert len(upstream.received) == 1


def test_unreachable_server_is_503(start):
    proxy = start(TORCHSERVE_PORT=str(free_ports(1)[0]))
    check_error(proxy.post(), 503, "ServerUnavailable", "5")


def test_late_answer_is_504(start, upstream):
    proxy = start(UPSTREAM_TIMEOUT="3")
    upstream.release.clear()
    began = time.monotonic()
    check_error(proxy.post(), 504, "UpstreamTimeout")
    assert 2.5 < time.monotonic() - began < 20
    assert len(upstream.received) == 1
