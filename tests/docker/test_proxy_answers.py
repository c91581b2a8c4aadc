"""What the proxy adds to requests, answers and its log, and how it translates TorchServe's errors."""

import time
import uuid

import pytest

from bundle.server.ports import free_ports
from tests.docker.proxy import PREDICT, check_error, http

# the exact answers of TorchServe 0.12.0
QUEUE_FULL = (
    b'{\n  "code": 503,\n  "type": "ServiceUnavailableException",\n  "message": "Model \\"mnist\\" has no worker to '
    b"serve inference request. Please use scale workers API to add workers. If this is a sequence inference, please "
    b'check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"\n}\n'
)
PREDICTION_FAILED = b'{\n  "code": 503,\n  "type": "InternalServerException",\n  "message": "Prediction failed"\n}\n'

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

    upstream.status, upstream.body = 503, QUEUE_FULL
    mark = uuid.uuid4().hex
    proxy.post(headers={"X-Request-Id": mark})
    line = proxy.access_log(mark)
    assert (line["method"], line["uri"], line["status"], line["upstream_status"]) == ("POST", PREDICT, 429, "503")


@pytest.mark.parametrize(
    ("content_type", "body", "passed"),
    [
        ("application/x-www-form-urlencoded", b"data=hello", "application/x-www-form-urlencoded"),
        ("application/x-www-form-urlencoded", "data=caf\xe9".encode(), "application/x-www-form-urlencoded"),
        ("application/x-www-form-urlencoded", b"", "application/x-www-form-urlencoded"),
        ("application/x-www-form-urlencoded", b"\x89PNG\r\n\x1a\n\x00\x00", "application/octet-stream"),
        ("Application/X-WWW-Form-Urlencoded", b"RIFF" + b"a" * 500_000 + b"\x00", "application/octet-stream"),
        ("application/json", b'{"data": 1}', "application/json"),
        ("multipart/form-data; boundary=x", b"--x\x00--x--", "multipart/form-data; boundary=x"),
        ("text/plain", b"\x00", "text/plain"),
        (None, b"\x00", None),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_content_type_of_a_file_sent_as_a_form_is_corrected(proxy, upstream, content_type, body, passed, chunked):
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert proxy.post(data=iter([body]) if chunked and body else body, headers=headers).status_code == 200
    [received] = upstream.received
    assert (received.headers["Content-Type"], received.body) == (passed, body)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 413, 429, 507])
def test_handler_error_passes_unchanged(proxy, upstream, status):
    upstream.status, upstream.headers = status, {"Content-Type": "application/json"}
    upstream.body = b'{"code": 413, "type": "ImageTooLarge", "message": "..."}'
    answer = proxy.post()
    assert (answer.status_code, answer.content) == (status, upstream.body)


def test_first_500_is_retried_and_the_second_answer_is_used(proxy, upstream):
    upstream.first = 500
    assert proxy.post().status_code == 200
    assert len(upstream.received) == 2


def test_retry_that_meets_a_full_queue_is_429(proxy, upstream):
    upstream.first, upstream.status, upstream.body = 500, 503, QUEUE_FULL
    check_error(proxy.post(), 429, "QueueFull", "1")


def test_message_of_a_500_is_replaced(proxy, upstream):
    upstream.status, upstream.body = 500, b'{"message": "java.lang.NullPointerException: at io.netty.handler ..."}'
    answer = proxy.post()
    check_error(answer, 500, "PredictionFailed")
    assert "java" not in answer.text


def test_only_a_500_is_retried_and_only_once(proxy, upstream):
    """After the death of one worker, another can answer."""
    for status, times in {500: 2, 400: 1, 413: 1, 429: 1, 507: 1}.items():
        upstream.received.clear()
        upstream.status = status
        assert proxy.post(data=b"the same").status_code == status
        assert [received.body for received in upstream.received] == [b"the same"] * times, status


def test_full_queue_is_429(proxy, upstream):
    upstream.status, upstream.body = 503, QUEUE_FULL
    check_error(proxy.post(), 429, "QueueFull", "1")
    assert len(upstream.received) == 1


def test_failed_batch_is_500(proxy, upstream):
    upstream.status, upstream.body = 503, PREDICTION_FAILED
    check_error(proxy.post(), 500, "PredictionFailed")
    assert len(upstream.received) == 1


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_closed_connection_is_503_and_not_retried(proxy, upstream, method):
    proxy.post()  # leaves a kept-alive connection, on which nginx retries by default
    upstream.received.clear()
    upstream.status = None
    check_error(http.request(method, proxy.url + PREDICT, data=b"x", timeout=10), 503, "ServerUnavailable", "5")
    assert len(upstream.received) == 1


def test_unreachable_server_is_503(start):
    proxy = start(TORCHSERVE_PORT=str(free_ports(1)[0]))
    check_error(proxy.post(), 503, "ServerUnavailable", "5")


def test_late_answer_is_504(proxy, upstream):
    upstream.release.clear()
    began = time.monotonic()
    check_error(proxy.post(), 504, "UpstreamTimeout")
    assert 2.5 < time.monotonic() - began < 6
    assert len(upstream.received) == 1
