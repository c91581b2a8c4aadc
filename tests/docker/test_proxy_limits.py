"""The proxy's limits: body size, slow clients, request rate and connections."""

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from tests.docker.proxy import PREDICT, Proxy, check_error, eventually, http

pytestmark = pytest.mark.usefixtures("fresh")


# -- bodies -----------------------------------------------------------------------------------------------------------


def in_chunks(size: int) -> Iterator[bytes]:
    for start in range(0, size, 65536):
        yield b"x" * min(65536, size - start)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_at_the_limit_passes(proxy, upstream, chunked):
    assert proxy.post(data=in_chunks(1 << 20) if chunked else b"x" * (1 << 20)).status_code == 200
    [received] = upstream.received
    assert len(received.body) == 1 << 20
    assert received.headers["Content-Length"] == str(1 << 20)
    assert received.headers["Transfer-Encoding"] is None


def test_body_over_the_limit_is_413_before_it_is_sent(proxy, upstream):
    status, headers, body = proxy.raw(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {(1 << 20) + 1}\r\n\r\n")
    assert (status, json.loads(body)["type"]) == (413, "BodyTooLarge")
    assert "1m" in json.loads(body)["message"]
    assert headers["Content-Type"] == "application/json"
    assert upstream.received == []


def test_chunked_body_over_the_limit_is_413(proxy, upstream):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    request = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17
    status, headers, body = proxy.raw(request)
    assert (status, json.loads(body)["type"]) == (413, "BodyTooLarge")
    assert headers["Content-Type"] == "application/json"
    assert upstream.received == []


def test_large_answer_passes(proxy, upstream):
    upstream.body = os.urandom(4 << 20)
    assert proxy.post().content == upstream.body


def test_slow_client_occupies_no_worker_and_is_disconnected(proxy, upstream):
    with socket.create_connection(("127.0.0.1", proxy.port), 20) as slow:
        slow.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na".encode())
        time.sleep(0.5)
        slow.sendall(b"b")
        time.sleep(0.5)
        assert upstream.received == []
        slow.sendall(b"c")
        eventually(lambda: upstream.received)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    upstream.received.clear()
    with (
        socket.create_connection(("127.0.0.1", proxy.port), 20) as headless,
        socket.create_connection(("127.0.0.1", proxy.port), 20) as bodiless,
    ):
        headless.sendall(b"POST /predictions/mnist HTTP/1.1\r\nHost")
        bodiless.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na".encode())
        began = time.monotonic()
        assert headless.recv(1000) == bodiless.recv(1000) == b""
        assert 8 < time.monotonic() - began < 15
    assert upstream.received == []


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(start) -> Proxy:
    return start(PROXY_RATE="1r/s", BURST="4", CONNECTIONS="2")


def test_requests_over_the_rate_are_429(strict, upstream):
    answers = [strict.post() for _ in range(10)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:5] == [200] * 5  # one and the burst of four
    assert statuses.count(200) <= 7
    assert len(upstream.received) == statuses.count(200)
    refused = next(answer for answer in answers if answer.status_code != 200)
    check_error(refused, 429, "TooManyRequests", "1")
    assert "1r/s" in refused.json()["message"]
    assert http.get(f"{strict.url}/ping", timeout=10).status_code == 200  # its limit is separate


def test_pings_over_their_rate_are_429(strict):
    answers = [http.get(f"{strict.url}/ping", timeout=10) for _ in range(60)]
    refused = [answer for answer in answers if answer.status_code != 200]
    check_error(refused[0], 429, "TooManyRequests", "1")


def test_connections_of_one_client_over_the_limit_are_429(start, upstream):
    proxy = start(CONNECTIONS="2")
    upstream.release.clear()
    waiting = [threading.Thread(target=proxy.post) for _ in range(2)]
    for thread in waiting:
        thread.start()
    eventually(lambda: len(upstream.received) == 2)
    check_error(proxy.post(), 429, "TooManyRequests", "1")
    upstream.release.set()
    for thread in waiting:
        thread.join()
    assert proxy.post().status_code == 200


MEGABYTE, MEDIUM = 1_000_000, 100_000  # bytes from which a body is large, and medium


@pytest.mark.parametrize(
    ("body", "encoding", "limited"),
    [
        (b"x" * MEGABYTE, None, True),
        (b"x" * (MEGABYTE - 1), None, False),
        (10, None, True),
        (gzip.compress(bytes(MEGABYTE)), "gzip", True),
        (gzip.compress(b"x"), "GZIP", True),
        (10, "gzip", True),
        (b"x" * MEGABYTE, ":", True),
    ],
    ids=["a megabyte", "a byte less", "of unknown length", "gzip", "tiny gzip", "gzip in chunks", "unknown encoding"],
)
@pytest.mark.parametrize("clients", ["one", "several"])
def test_large_bodies_over_their_number_are_429(start, upstream, body, encoding, limited, clients):
    """The limits, for one client and for all, bound the memory. Small requests are unaffected.

    TorchServe decompresses bodies, so a compressed one may be large in its heap. A number is the size of a body that is
    sent in chunks.
    """
    bounds = {"one": ("9", "2"), "several": ("2", "1")}[clients]
    proxy = start(LARGE_BODIES=bounds[0], LARGE_BODIES_OF_CLIENT=bounds[1], MAX_BODY="2m", TRUSTED_PROXIES="127.0.0.1")

    def post(client: int) -> requests.Response:
        headers = {"X-Forwarded-For": f"1.1.1.{client if clients == 'several' else 1}"}
        headers |= {"Content-Encoding": encoding} if encoding else {}
        return proxy.post(data=in_chunks(body) if isinstance(body, int) else body, headers=headers)

    check_one_more(upstream, [lambda n=n: post(n) for n in (1, 2)], lambda: post(3), limited)


@pytest.mark.parametrize("clients", [1, 4], ids=["one", "several"])
def test_medium_bodies_over_their_number_are_429(start, upstream, clients):
    """The limits are 64 for one client and 256 for all."""
    proxy = start(TRUSTED_PROXIES="127.0.0.1")

    def post(client: int, size: int) -> requests.Response:
        return proxy.post(data=b"x" * size, headers={"X-Forwarded-For": f"1.1.1.{client}"})

    full = [lambda client=client: post(client, MEDIUM) for client in range(clients) for _ in range(64)]
    another = 0 if clients == 1 else clients
    check_one_more(upstream, full, lambda: post(another, MEDIUM), limited=True)
    upstream.received.clear()
    check_one_more(upstream, full, lambda: post(another, MEDIUM - 1), limited=False)
    upstream.received.clear()
    check_one_more(upstream, full[:64], lambda: post(clients, MEDIUM), limited=False)


def check_one_more(upstream, waiting: list, another, limited: bool) -> None:
    """Check whether one more request is rejected while the others wait for their answers."""
    upstream.release.clear()
    threads = [threading.Thread(target=post) for post in waiting]
    for thread in threads:
        thread.start()
    eventually(lambda: len(upstream.received) == len(waiting))
    if limited:
        check_error(another(), 429, "TooManyRequests", "1")
    else:
        threads.append(threading.Thread(target=another))
        threads[-1].start()
        eventually(lambda: len(upstream.received) == len(waiting) + 1)
    upstream.release.set()
    for thread in threads:
        thread.join()
    assert another().status_code == 200


def test_each_client_behind_a_trusted_load_balancer_has_its_own_limits(start, upstream):
    proxy = start(TRUSTED_PROXIES="10.0.0.0/8 127.0.0.1", PROXY_RATE="1r/m", BURST="1")
    statuses = [
        proxy.post(headers={"X-Forwarded-For": f"6.6.6.6, 1.1.1.{n}, 10.1.1.1"}).status_code for n in (1, 1, 1, 2)
    ]
    assert statuses == [200, 200, 429, 200]
    assert [received.headers["X-Forwarded-For"] for received in upstream.received] == ["1.1.1.1", "1.1.1.1", "1.1.1.2"]
