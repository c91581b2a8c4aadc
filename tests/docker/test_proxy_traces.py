"""The traces that the proxy begins and continues, with a server of the tests in place of TorchServe."""

import json
import re
import secrets
import socket
import uuid

import pytest

from tests.docker.proxy import PREDICT, Proxy, Upstream

pytestmark = pytest.mark.usefixtures("fresh")

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACING = {"TRACE_ENDPOINT": "http://collector:4317"}


@pytest.fixture(scope="module")
def traced(start) -> Proxy:
    """A proxy that samples no request by itself."""
    return start(**TRACING, TRACE_RATIO="0")


@pytest.fixture(scope="module")
def sampling(start) -> Proxy:
    """A proxy that samples every request, and lets no client decide."""
    return start(**TRACING, TRACE_RATIO="1.0", TRACE_CLIENTS="false", CORS_ORIGINS="*")


def passed_on(upstream: Upstream) -> tuple[list[str], str]:
    """Return the parts of the last request's traceparent, and the id of the request's span."""
    headers = upstream.received[-1].headers
    [sent] = headers.get_all("traceparent")
    [span] = headers.get_all("bundle-span")
    version, *parts = sent.split("-")
    assert version == "00"
    return parts, span


def test_trace_begins_at_the_proxy(sampling: Proxy, upstream: Upstream):
    answer = sampling.post(headers={"Origin": "https://a.example"})
    (trace, parent, flags), span = passed_on(upstream)
    assert (len(trace), len(span), flags, parent) == (32, 16, "01", span)
    assert answer.headers["traceresponse"] == f"00-{trace}-{span}-01"
    assert "traceresponse" in answer.headers["Access-Control-Expose-Headers"]
    sampling.post()
    assert passed_on(upstream)[0][0] != trace


def test_trace_of_a_client_is_continued(traced: Proxy, upstream: Upstream):
    answer = traced.post(headers={"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"})
    parts, span = passed_on(upstream)
    assert (parts, span == SPAN) == ([TRACE, SPAN, "01"], False)
    assert upstream.received[-1].headers["tracestate"] == "vendor=1"
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span}-01"
    traced.post(headers={"traceparent": f"cc-{TRACE}-{SPAN}-03-of-a-later-version"})
    assert passed_on(upstream)[0] == [TRACE, SPAN, "03"]


@pytest.mark.parametrize(
    "sent",
    [
        *(None, "", "x", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01-x", f"ff-{TRACE}-{SPAN}-01"),
        *(f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01"),
    ],
)
def test_missing_or_invalid_trace_is_replaced(traced: Proxy, upstream: Upstream, sent: str | None):
    answer = traced.post(headers={"tracestate": "vendor=1"} | ({} if sent is None else {"traceparent": sent}))
    (trace, parent, flags), span = passed_on(upstream)
    assert re.fullmatch("[0-9a-f]{32}", trace)
    assert (trace == TRACE, parent, flags) == (False, span, "00")
    assert "tracestate" not in upstream.received[-1].headers
    assert answer.headers["traceresponse"] == f"00-{trace}-{span}-00"


@pytest.mark.parametrize(("size", "kept"), [(512, True), (513, False), (7000, False)])
def test_long_tracestate_is_dropped(traced: Proxy, upstream: Upstream, size: int, kept: bool):
    state = f"vendor={'x' * (size - 7)}"
    traced.post(headers={"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": state})
    assert passed_on(upstream)[0] == [TRACE, SPAN, "01"]
    assert upstream.received[-1].headers["tracestate"] == (state if kept else None)


def test_span_of_a_request_is_not_chosen_by_its_client(traced: Proxy, upstream: Upstream):
    traced.post(headers={"bundle-span": SPAN, "Bundle-Span": SPAN, "traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert passed_on(upstream)[1] != SPAN


def test_clients_that_do_not_decide_keep_their_trace(sampling: Proxy, upstream: Upstream):
    sampling.post(headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert passed_on(upstream)[0] == [TRACE, SPAN, "01"]


def test_ratio_is_a_part_of_the_requests(start, upstream: Upstream):
    proxy = start(**TRACING, TRACE_RATIO="0.25")
    for _ in range(400):
        proxy.post()
    sampled = sum(each.headers["traceparent"].endswith("-01") for each in upstream.received)
    assert 55 < sampled < 155  # five standard deviations


def test_request_that_passes_the_proxy_twice_has_one_trace(start, upstream: Upstream):
    """Without a place for a large body, a body in chunks comes back through a socket."""
    proxy = start(**TRACING, TRACE_RATIO="0.5", TRACE_CLIENTS="false", LARGE_BODIES="1", LARGE_BODIES_OF_CLIENT="1")
    chunked = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port)) as holder:
        holder.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
        seen = set()
        for _ in range(20):
            status, headers, _ = proxy.raw(chunked)
            assert status == 200
            (trace, parent, flags), span = passed_on(upstream)
            assert parent == span
            assert headers.get_all("traceresponse") == [f"00-{trace}-{span}-{flags}"]
            seen.add(flags)
    assert seen == {"00", "01"}


def test_errors_and_the_log_have_the_trace(traced: Proxy, upstream: Upstream):
    mark, trace = uuid.uuid4().hex, secrets.token_hex(16)
    upstream.status = None  # it closes the connection
    answer = traced.post(headers={"X-Request-Id": mark, "traceparent": f"00-{trace}-{SPAN}-01"})
    assert answer.status_code == 503
    assert answer.headers["traceresponse"].split("-")[1] == trace
    assert traced.access_log(mark)["trace_id"] == trace


def test_upstreams_own_header_is_hidden_and_other_paths_have_none(traced: Proxy, upstream: Upstream):
    upstream.headers = {"traceresponse": "torchserves-own"}
    assert "torchserves-own" not in traced.post().headers["traceresponse"]
    assert "traceresponse" not in traced.post("/nonesuch").headers


def test_without_an_endpoint_nothing_is_added(proxy: Proxy, upstream: Upstream):
    answer = proxy.post(headers={"traceparent": "as it came"})
    headers = upstream.received[-1].headers
    assert headers["traceparent"] == "as it came"
    assert "bundle-span" not in headers
    assert "traceresponse" not in json.dumps(dict(answer.headers))


@pytest.mark.parametrize(("name", "value"), [("TRACE_RATIO", "10%"), ("TRACE_RATIO", "2"), ("TRACE_CLIENTS", "no")])
def test_invalid_setting_is_refused(start, name: str, value: str):
    with pytest.raises(AssertionError, match=f"{name} is '{value}'. It must be"):
        start(**TRACING, **{name: value})
