"""The proxy's limits: body size, slow clients, request rate and connections."""

import gzip
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
        socket.create_connection(("127.0.0.1", proxy.port), 50) as headless,
        socket.create_connection(("127.0.0.1", proxy.port), 50) as bodiless,
    ):
        began = time.monotonic()
        headless.sendall(b"POST /predictions/mnist HTTP/1.1\r\nHost")
        bodiless.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\na".encode())
        assert headless.recv(1000) == bodiless.recv(1000) == b""
        assert 8 < time.monotonic() - began < 40  # by default, nginx waits for 60 s
    assert upstream.received == []


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(start) -> Proxy:
    return start(PROXY_RATE="1r/m", BURST="4", CONNECTIONS="2")


def test_requests_over_the_rate_are_429(strict, upstream):
    answers = [strict.post() for _ in range(10)]
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200] * 5 + [429] * 5  # one and the burst of four
    assert len(upstream.received) == 5
    check_error(answers[5], 429, "TooManyRequests", "1")
    assert "1r/m" in answers[5].json()["message"]
    assert http.get(f"{strict.url}/ping", timeout=10).status_code == 200  # its limit is separate


def test_pings_over_their_rate_are_429(strict):
    with ThreadPoolExecutor(10) as pool:
        answers = [*pool.map(lambda _: http.get(f"{strict.url}/ping", timeout=30), range(300))]
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
    eventually(lambda: proxy.post().status_code == 200)


MEGABYTE, MEDIUM = 1_000_000, 100_000  # bytes from which a body is large, and medium


@pytest.mark.parametrize(
    ("body", "encoding", "limited"),
    [
        (b"x" * MEGABYTE, None, True),
        (b"x" * (MEGABYTE - 1), None, False),
        (MEDIUM - 1, None, False),
        (MEDIUM, None, True),
        (gzip.compress(bytes(MEGABYTE)), "gzip", True),
        (gzip.compress(b"x"), "GZIP", True),
        (10, "gzip", True),
        (b"x" * MEGABYTE, ":", True),
    ],
    ids=[
        *("a megabyte", "a byte less", "small in chunks", "in chunks"),
        *("gzip", "tiny gzip", "gzip in chunks", "unknown encoding"),
    ],
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


def test_small_bodies_in_chunks_count_as_requests_of_their_client(start, upstream):
    """A body that finds all places for large ones taken is read, and then it is an ordinary small request."""
    proxy = start(LARGE_BODIES="1", LARGE_BODIES_OF_CLIENT="1", CONNECTIONS="3", TRUSTED_PROXIES="127.0.0.1")

    def post(client: int = 1) -> requests.Response:
        headers = {"X-Forwarded-For": f"1.1.1.{client}", "X-Forwarded-Proto": "ftp", "X-Request-Id": f"of-{client}"}
        return proxy.post(f"{PREDICT}/1.0?top_k=1", data=in_chunks(50_000), headers=headers)

    check_one_more(upstream, [post] * 3, post, limited=True)
    upstream.received.clear()
    check_one_more(upstream, [post] * 3, lambda: post(2), limited=False)
    for received in upstream.received:
        assert (received.path, len(received.body)) == (f"{PREDICT}/1.0?top_k=1", 50_000)
        client = received.headers["X-Forwarded-For"].removeprefix("1.1.1.")
        assert received.headers.get_all("X-Request-Id") == [f"of-{client}"]
        assert received.headers.get_all("X-Forwarded-Proto") == ["http"]


def test_answer_to_a_small_body_in_chunks_passes_like_any_other(start, upstream):
    origin = "https://app.example.com"
    proxy = start(LARGE_BODIES="1", LARGE_BODIES_OF_CLIENT="1", CORS_ORIGINS=origin)
    upstream.release.clear()
    first = threading.Thread(target=lambda: proxy.post(data=b"x" * MEGABYTE))
    first.start()
    eventually(lambda: upstream.received)
    upstream.status, upstream.body = 413, b'{"code": 413, "type": "ImageTooLarge", "message": "..."}'
    upstream.headers = {"Content-Type": "application/json"}
    answers = []
    second = threading.Thread(target=lambda: answers.append(proxy.post(data=in_chunks(10), headers={"Origin": origin})))
    second.start()
    eventually(lambda: len(upstream.received) == 2)
    upstream.release.set()
    for thread in (first, second):
        thread.join()
    assert (answers[0].status_code, answers[0].content) == (413, upstream.body)
    assert (answers[0].headers["Access-Control-Allow-Origin"], answers[0].headers["Vary"]) == (origin, "Origin")


def test_requests_in_chunks_count_once_for_the_rate(start, upstream):
    proxy = start(LARGE_BODIES="1", LARGE_BODIES_OF_CLIENT="1", PROXY_RATE="1r/m", BURST="3")
    post = [lambda: proxy.post(data=in_chunks(10))] * 3
    check_answers(upstream, post, [200] * 3)
    assert [proxy.post().status_code for _ in range(2)] == [200, 429]


def check_answers(upstream, requests_: list, statuses: list[int]) -> None:
    """Send the requests so that all of them are in flight together, and check their statuses."""
    upstream.release.clear()
    found: list[int] = []
    threads = [threading.Thread(target=lambda post=post: found.append(post().status_code)) for post in requests_]
    for thread in threads:
        thread.start()
    eventually(lambda: len(upstream.received) == len(requests_))
    upstream.release.set()
    for thread in threads:
        thread.join()
    assert found == statuses


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
    eventually(lambda: another().status_code == 200)


def test_each_client_behind_a_trusted_load_balancer_has_its_own_limits(start, upstream):
    proxy = start(TRUSTED_PROXIES="10.0.0.0/8 127.0.0.1", PROXY_RATE="1r/m", BURST="1")
    statuses = [
        proxy.post(headers={"X-Forwarded-For": f"6.6.6.6, 1.1.1.{n}, 10.1.1.1"}).status_code for n in (1, 1, 1, 2)
    ]
    assert statuses == [200, 200, 429, 200]
    assert [received.headers["X-Forwarded-For"] for received in upstream.received] == ["1.1.1.1", "1.1.1.1", "1.1.1.2"]
