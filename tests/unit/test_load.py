"""bundle/load/generator.py with a real wrk, on small servers whose behaviour is known.

The assertions hold on a busy machine, too: benchmarks measure speed, tests do not.
"""

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

HANG, BREAK = "hang", "break"  # what a server may do instead of answering with a status


def needs_wrk(test: Callable) -> Callable:
    """Mark a test that runs wrk on a server."""
    missing = shutil.which("wrk") is None
    return pytest.mark.slow(pytest.mark.skipif(missing, reason="wrk is not installed: apt-get install wrk")(test))


@dataclass
class Known:
    """A running server.

    Attributes:
        url: where it listens.
        seen: body and Content-Type of every request.
    """

    url: str
    seen: list[tuple[bytes, str]] = field(default_factory=list)


@contextmanager
def known_server(behave: Callable[[int], int | str], idle_timeout: float | None = None) -> Iterator[Known]:
    """Run a server that does what `behave` returns.

    Args:
        behave: takes the number of the request; returns a status, HANG or BREAK; it may sleep.
        idle_timeout: seconds after which the server closes an unused connection.
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
            """Print nothing: wrk ends by breaking its connections."""

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
def test_closed_loop_counts_every_answer():
    with known_server(lambda _: slow(0.02)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=4, seconds=1)
        assert seen.failed == 0
        assert seen.answered == len(server.seen) > 0  # none is cut off at the end
        assert 0 < seen.throughput <= 4 / 0.02
        assert 0.02 <= seen.p50 <= seen.p95 <= seen.p99 <= seen.longest


@needs_wrk
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_closed_loop_keeps_one_request_in_flight_per_client(concurrency: int):
    inside, most, lock = 0, 0, threading.Lock()
    all_inside = threading.Barrier(concurrency)

    def behave(number: int) -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        if number < concurrency:
            all_inside.wait(30)  # breaks if there are fewer clients
        with lock:
            inside -= 1
        return 200

    with known_server(behave) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency, seconds=0.5)
    assert (most, seen.failed) == (concurrency, 0)


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_body_and_headers_are_sent_unchanged(loop: Callable):
    body = bytes(range(256)) * 1000
    with known_server(lambda _: slow(0.01)) as server:
        loop(server.url, body, {"Content-Type": "image/png"}, 20, seconds=0.2)
        assert set(server.seen) == {(body, "image/png")}


@needs_wrk
@pytest.mark.parametrize("status", [302, 404, 503])
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_status_other_than_2xx_counts_as_failed(loop: Callable, status: int):
    with known_server(lambda number: slow(0.005, status if number % 4 == 0 else 200)) as server:
        seen = loop(server.url, b"x", {}, 40, seconds=0.5)
        assert seen.failed == math.ceil(len(server.seen) / 4)
        assert seen.answered == len(server.seen) - seen.failed


@needs_wrk
def test_load_without_good_answers_has_infinite_latency():
    with known_server(lambda _: slow(0.01, 500)) as server:
        seen = load.closed_loop(server.url, b"x", {}, 2, seconds=0.2)
    assert seen.answered == seen.throughput == 0
    assert seen.failed > 0
    assert seen.p50 == seen.longest == math.inf


@needs_wrk
def test_latencies_are_of_sent_requests_only():
    """One of 50 answers is slow. wrk's own p95 would be slow, too: it adds requests that nobody sent."""
    with known_server(lambda number: slow(0.3 if number % 50 == 20 else 0.005)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=1, seconds=6)
    assert 0.005 <= seen.p50 <= seen.p95 < 0.3 <= seen.p99 <= seen.longest


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_unanswered_request_counts_as_failed(loop: Callable):
    with known_server(lambda number: HANG if number == 5 else slow(0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5, timeout=5)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_answer_after_the_timeout_counts_as_failed(loop: Callable):
    with known_server(lambda number: slow(7 if number == 5 else 0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5, timeout=5)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
@pytest.mark.parametrize("loop", [load.closed_loop, load.open_loop])
def test_broken_connection_fails_one_request_only(loop: Callable):
    with known_server(lambda number: BREAK if number == 5 else slow(0.01)) as server:
        seen = loop(server.url, b"x", {}, 16, seconds=0.5)
        assert (seen.answered, seen.failed) == (len(server.seen) - 1, 1)


@needs_wrk
def test_run_shorter_than_one_answer_waits_for_it():
    """An answer takes 1.5 s, the run 1 s. Throughput is of the time until the last answer."""
    with known_server(lambda _: slow(1.5)) as server:
        seen = load.closed_loop(server.url, b"x", {}, concurrency=2, seconds=1)
    assert (seen.answered, seen.failed) == (2, 0)
    assert 0 < seen.throughput <= 2 / 1.5


@needs_wrk
def test_open_loop_sends_the_same_arrivals_in_every_run():
    with known_server(lambda _: slow(0.005)) as server:
        first = load.open_loop(server.url, b"x", {}, rate=200, seconds=1)
        second = load.open_loop(server.url, b"x", {}, rate=200, seconds=1)
    assert first.failed == second.failed == 0
    assert first.answered == second.answered
    assert 150 < first.answered < 250  # of a fixed seed


@needs_wrk
def test_open_loop_latency_includes_a_stall_that_a_closed_loop_hides():
    begin = None

    def behave(_: int) -> int:  # nothing is answered in the second second after the first request
        nonlocal begin
        begin = begin or time.monotonic()
        passed = time.monotonic() - begin
        return slow(max(0.005, 2 - passed) if passed >= 1 else 0.005)

    with known_server(behave) as server:
        closed = load.closed_loop(server.url, b"x", {}, concurrency=1, seconds=3)
        begin = None
        opened = load.open_loop(server.url, b"x", {}, rate=100, seconds=3)
    assert closed.longest > 0.8
    assert opened.p95 > 0.5 > closed.p95
    assert opened.failed == 0


@needs_wrk
def test_open_loop_latency_includes_the_wait_for_a_connection():
    with known_server(lambda _: slow(0.02)) as server:  # at most 50 a second on one connection
        seen = load.open_loop(server.url, b"x", {}, rate=100, seconds=1, connections=1)
        assert seen.answered == len(server.seen) > 70
    assert seen.throughput <= 50
    assert seen.longest > 0.4


@needs_wrk
def test_open_loop_keeps_hundreds_of_requests_in_flight():
    """More than 500 are sent within half a second, and the first answer comes after one second."""
    with known_server(lambda _: slow(1)) as server:
        seen = load.open_loop(server.url, b"x", {}, rate=1200, seconds=0.5, connections=1000, timeout=30)
        assert seen.answered == len(server.seen) > 500
    assert seen.failed == 0


PIECES = {
    "chunked": [
        b"HTTP/1.1 200 -\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1",
        b"0\r\n",
        b"x" * 16 + b"\r\n0\r\n\r\n",
    ],
    "headers in pieces": [b"HTTP/1.1 200 -\r\nContent-", b"Length: 5\r\n", b"\r\nhello"],
    "large": [b"HTTP/1.1 200 -\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1_000_000],
    "closing": [b"HTTP/1.1 200 -\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"],
}


@needs_wrk
@pytest.mark.parametrize("form", PIECES)
def test_open_loop_reads_every_form_of_answer(form: str):
    """A second answer on the same connection is read, too: nothing of the first one is left over."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        close_connection = False

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            for piece in PIECES[form]:
                self.connection.sendall(piece)
                time.sleep(0.01)
            self.close_connection = form == "closing"

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        seen = load.open_loop(url, b"x", {}, rate=20, seconds=1, connections=1)
        server.shutdown()
    assert (seen.answered > 10, seen.failed) == (True, 0)


@needs_wrk
def test_connection_closed_while_idle_is_not_a_failure():
    with known_server(lambda _: 200, idle_timeout=1.2) as server:
        seen = load.open_loop(server.url, b"x", {}, rate=2, seconds=5, connections=8)
    assert seen.failed == 0
    assert seen.answered > 3


@needs_wrk
def test_load_without_a_server_raises_the_reason():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(BundleError, match="could not send requests to") as caught:
            load.closed_loop(f"http://127.0.0.1:{unused.getsockname()[1]}/", b"x", {}, 1, 1)
    assert "refused" in caught.value.details


def test_load_without_wrk_raises_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BundleError, match="apt-get install wrk"):
        load.closed_loop("http://127.0.0.1:1/", b"x", {}, 1, 1)


@pytest.mark.parametrize(
    ("rate", "seconds", "connections", "message"),
    [
        (0, 1, 1, "rate is 0 .* must be above 0"),
        (1, 0, 1, "duration is 0 seconds"),
        (1, 1, 0, "connections is 0, and must be at least 1"),
    ],
)
def test_open_loop_with_an_invalid_number_is_rejected(rate: float, seconds: float, connections: int, message: str):
    with pytest.raises(BundleError, match=message):
        load.open_loop("http://127.0.0.1:1/", b"x", {}, rate, seconds, connections)


def test_closed_loop_without_clients_is_rejected():
    with pytest.raises(BundleError, match="clients is 0, and must be at least 1"):
        load.closed_loop("http://127.0.0.1:1/", b"x", {}, concurrency=0, seconds=1)
