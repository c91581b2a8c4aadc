"""bundle/load/generator.py with a real wrk, on small servers whose behaviour is known."""

import itertools
import math
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bundle.errors import BundleError
from bundle.load import generator as load

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")

HANG, BREAK = "hang", "break"  # what a server may do instead of answering a status


@dataclass
class Known:
    """A server that does as `behave` says.

    Attributes:
        url: where it listens.
        seen: body and Content-Type of every request.
    """

    url: str
    seen: list[tuple[bytes, str]] = field(default_factory=list)


@contextmanager
def known_server(behave: Callable[[int], int | str], idle_timeout: float | None = None) -> Iterator[Known]:
    """
    Args:
        behave: number of the request -> status, or HANG or BREAK; it may sleep.
        idle_timeout: seconds after which the server closes a connection that nobody uses.
    """
    numbers = itertools.count()
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = idle_timeout

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known.seen.append((body, self.headers["Content-Type"]))
            outcome = behave(next(numbers))
            if outcome == HANG:
                closing.wait()
            if isinstance(outcome, int):
                self.connection.sendall(f"HTTP/1.1 {outcome} -\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            else:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """wrk leaves without saying goodbye."""

    server = Server(("127.0.0.1", 0), Handler)
    known = Known(f"http://127.0.0.1:{server.server_port}/predictions/known")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield known
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


def slow(seconds: float, status: int = 200) -> int:
    time.sleep(seconds)
    return status


@needs_wrk
def test_a_closed_loop_waits_for_its_answers():
    with known_server(lambda _: slow(0.02)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=4, seconds=1)
        assert seen.failed == 0
        assert seen.answered == len(server.seen)  # none is cut off at the end
        assert 100 < seen.throughput <= 4 / 0.02
        assert 0.02 <= seen.p50 <= seen.p95 <= seen.p99 <= seen.longest < 0.5


@needs_wrk
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_as_many_requests_are_on_their_way_as_there_are_clients(concurrency: int):
    inside, most, lock = 0, 0, threading.Lock()

    def behave(_: int) -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.03)
        with lock:
            inside -= 1
        return 200

    with known_server(behave) as server:
        load.closed_loop(server.url, b"x", {}, concurrency, seconds=0.5)
    assert most == concurrency


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_body_and_headers_arrive_as_they_are(loop: Callable):
    body = bytes(range(256)) * 1000
    with known_server(lambda _: slow(0.01)) as server:
        loop(server.url, body, {"Content-Type": "image/png"}, 20, seconds=0.2)
        assert set(server.seen) == {(body, "image/png")}


@needs_wrk
@pytest.mark.parametrize("status", [302, 404, 503])
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_another_status_is_a_failure(loop: Callable, status: int):
    with known_server(lambda number: slow(0.005, status if number % 4 == 0 else 200)) as server:
        seen = loop(server.url, b"x", {}, 40, seconds=0.5)
        assert seen.failed == math.ceil(len(server.seen) / 4)
        assert seen.answered == len(server.seen) - seen.failed


@needs_wrk
def test_no_good_answer_has_no_latency():
    with known_server(lambda _: slow(0.01, 500)) as server:
        seen = load.closed_loop(server.url, b"x", {}, 2, seconds=0.2)
    assert seen.answered == seen.throughput == 0
    assert seen.failed > 0
    assert seen.p50 == seen.longest == math.inf


@needs_wrk
def test_latencies_are_those_that_clients_saw():
    """Of 25 answers, 24 are fast. wrk's own p95 would be slow: it adds requests that nobody sent."""
    with known_server(lambda number: slow(0.3 if number % 25 == 24 else 0.005)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=1, seconds=2.2)
    assert 0.005 <= seen.p50 <= seen.p95 < 0.1
    assert 0.3 <= seen.p99 <= seen.longest < 0.6


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_a_request_that_is_never_answered_is_a_failure(loop: Callable):
    with known_server(lambda number: HANG if number == 5 else slow(0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5, timeout=1)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_an_answer_that_comes_too_late_is_a_failure(loop: Callable):
    with known_server(lambda number: slow(1.5 if number == 5 else 0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5, timeout=1)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_a_broken_connection_is_a_failure_and_the_others_go_on(loop: Callable):
    with known_server(lambda number: BREAK if number == 5 else slow(0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
def test_a_slow_server_is_waited_for():
    """A second is too short for an answer: two clients still see two answers every 1.5 s."""
    with known_server(lambda _: slow(1.5)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=2, seconds=1)
    assert (seen.answered, seen.failed) == (2, 0)
    assert seen.throughput == pytest.approx(2 / 1.5, rel=0.2)


@needs_wrk
def test_an_open_loop_keeps_its_rate():
    with known_server(lambda _: slow(0.005)) as server:
        first = load.open_loop(server.url, b"x", {}, rate=200, seconds=1)
        second = load.open_loop(server.url, b"x", {}, rate=200, seconds=1)
    assert first.failed == second.failed == 0
    assert 150 < first.answered < 250
    assert first.answered == second.answered  # the same arrivals for everything that is compared
    assert 0.005 <= first.p50 < 0.1


@needs_wrk
def test_an_open_loop_sees_a_stall_that_a_closed_loop_hides():
    begin = time.monotonic()

    def behave(_: int) -> int:  # nothing is answered in the second that starts a second after `begin`
        passed = time.monotonic() - begin
        return slow(max(0.005, 2 - passed) if passed >= 1 else 0.005)

    with known_server(behave) as server:
        closed = load.closed_loop(server.url, b"x", {}, concurrency=1, seconds=3)
        begin = time.monotonic()
        opened = load.open_loop(server.url, b"x", {}, rate=100, seconds=3)
    assert closed.longest > 0.8
    assert closed.p95 < 0.1
    assert opened.p99 > 0.8
    assert opened.p95 > 0.5
    assert opened.failed == 0


@needs_wrk
def test_an_open_loop_counts_the_wait_for_a_connection():
    with known_server(lambda _: slow(0.02)) as server:  # 50 a second on one connection
        seen = load.open_loop(server.url, b"x", {}, rate=100, seconds=1, connections=1)
        assert seen.answered == len(server.seen) > 70
    assert seen.throughput < 50
    assert seen.longest > 0.4


@needs_wrk
def test_a_connection_closed_as_idle_is_no_failure():
    with known_server(lambda _: 200, idle_timeout=1.2) as server:
        seen = load.open_loop(server.url, b"x", {}, rate=2, seconds=5, connections=8)
    assert seen.failed == 0
    assert seen.answered > 3


@needs_wrk
def test_a_missing_server_is_said():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(BundleError, match="could not send requests to") as caught:
            load.closed_loop(f"http://127.0.0.1:{unused.getsockname()[1]}/", b"x", {}, 1, 1)
    assert "refused" in caught.value.details


def test_a_missing_wrk_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BundleError, match="apt-get install wrk"):
        load.closed_loop("http://127.0.0.1:1/", b"x", {}, 1, 1)


@pytest.mark.parametrize(("rate", "seconds", "connections"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_load_that_makes_no_sense_is_refused(rate: float, seconds: float, connections: int):
    with pytest.raises(BundleError):
        load.open_loop("http://127.0.0.1:1/", b"x", {}, rate, seconds, connections)
