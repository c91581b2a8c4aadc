"""The proxy's limits: sizes of bodies, slow clients, rates and connections."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from tests.docker.proxy import PREDICT, Proxy, check_error, eventually, http

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("fresh")]


# -- bodies -----------------------------------------------------------------------------------------------------------


def in_chunks(size: int) -> Iterator[bytes]:
    for start in range(0, size, 65536):
        yield b"x" * min(65536, size - start)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_largest_body_passes(proxy, upstream, chunked):
    assert proxy.post(data=in_chunks(1 << 20) if chunked else b"x" * (1 << 20)).status_code == 200
    [received] = upstream.received
    assert len(received.body) == 1 << 20
    assert received.headers["Content-Length"] == str(1 << 20)
    assert received.headers["Transfer-Encoding"] is None


def test_a_larger_body_is_413_before_it_is_sent(proxy, upstream):
    status, headers, body = proxy.raw(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {(1 << 20) + 1}\r\n\r\n")
    assert (status, json.loads(body)["type"]) == (413, "BodyTooLarge")
    assert "1m" in json.loads(body)["message"]
    assert headers["Content-Type"] == "application/json"
    assert upstream.received == []


def test_a_larger_body_in_chunks_is_413(proxy, upstream):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    request = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17
    status, headers, body = proxy.raw(request)
    assert (status, json.loads(body)["type"]) == (413, "BodyTooLarge")
    assert headers["Content-Type"] == "application/json"
    assert upstream.received == []


def test_large_answers_pass(proxy, upstream):
    upstream.body = os.urandom(4 << 20)
    assert proxy.post().content == upstream.body


def test_a_slow_client_occupies_no_worker_and_is_cut_off(proxy, upstream):
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
    return start(RATE="1r/s", BURST="4", CONNECTIONS="2")


def test_rate_limit(strict, upstream):
    answers = [strict.post() for _ in range(10)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:5] == [200] * 5  # one, and the burst of four
    assert statuses.count(200) <= 7
    assert len(upstream.received) == statuses.count(200)
    refused = next(answer for answer in answers if answer.status_code != 200)
    check_error(refused, 429, "TooManyRequests", "1")
    assert "1r/s" in refused.json()["message"]
    assert http.get(f"{strict.url}/ping", timeout=10).status_code == 200  # has a limit of its own


def test_ping_has_a_limit_too(strict):
    answers = [http.get(f"{strict.url}/ping", timeout=10) for _ in range(60)]
    refused = [answer for answer in answers if answer.status_code != 200]
    check_error(refused[0], 429, "TooManyRequests", "1")


def test_connections_of_one_client(start, upstream):
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


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_of_all_clients(start, upstream, chunked):
    """What is held in memory is bounded, whoever sends it; small requests do not notice."""
    proxy = start(LARGE_BODIES="2", MAX_BODY="2m", TRUSTED_PROXIES="127.0.0.1")

    def post(client: int, size: int = 1_500_000) -> requests.Response:
        body = in_chunks(size) if chunked else b"x" * size
        return proxy.post(data=body, headers={"X-Forwarded-For": f"1.1.1.{client}"})

    upstream.release.clear()
    waiting = [threading.Thread(target=post, args=(client,)) for client in (1, 2)]
    for thread in waiting:
        thread.start()
    eventually(lambda: len(upstream.received) == 2)
    check_error(post(3), 429, "TooManyRequests", "1")
    small = threading.Thread(target=proxy.post)
    small.start()
    eventually(lambda: len(upstream.received) == 3)
    upstream.release.set()
    for thread in (*waiting, small):
        thread.join()
    assert post(3).status_code == 200


def test_clients_behind_a_trusted_load_balancer_have_limits_of_their_own(start, upstream):
    proxy = start(TRUSTED_PROXIES="10.0.0.0/8 127.0.0.1", RATE="1r/m", BURST="1")
    statuses = [
        proxy.post(headers={"X-Forwarded-For": f"6.6.6.6, 1.1.1.{n}, 10.1.1.1"}).status_code for n in (1, 1, 1, 2)
    ]
    assert statuses == [200, 200, 429, 200]
    assert [received.headers["X-Forwarded-For"] for received in upstream.received] == ["1.1.1.1", "1.1.1.1", "1.1.1.2"]
