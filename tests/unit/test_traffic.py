"""The clients of `Traffic`: which requests they send again, and which count as failed."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support import wait_for
from tests.traffic import Traffic

BODY = b"input"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Behavior = Callable[[int, socket.socket], bool]


@contextmanager
def serving(behavior: Behavior) -> Iterator[str]:
    """Serve until the block ends, and yield the URL.

    Args:
        behavior: gets the number of requests that the connection has had, and the connection; returns whether to keep
            it.
    """

    def serve(connection: socket.socket) -> None:
        with connection:
            number, received = 0, b""
            while data := connection.recv(65536):
                received += data
                if received.endswith(BODY):
                    number, received = number + 1, b""
                    if not behavior(number, connection):
                        return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # shut down
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/predictions/mnist"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def outcomes(behavior: Behavior, **options: bool) -> tuple[set[int | str], int]:
    """Send ten requests at least, and return the kinds of outcomes, and how many requests were sent again."""
    with serving(behavior) as url, Traffic(url, BODY, "ok", clients=1, **options) as load:
        wait_for(lambda: load.counts.total() >= 10)
    return set(load.counts), load.resent


def closing(after: int, seconds: float = 0, part: bytes = b"") -> Behavior:
    """Return the behavior of a server that does not answer the request after some."""

    def behave(number: int, connection: socket.socket) -> bool:
        if number <= after:
            connection.sendall(ANSWER)
            return True
        time.sleep(seconds)
        connection.sendall(part)
        return False

    return behave


def test_request_on_a_kept_connection_that_is_closed_at_once_is_sent_again():
    seen, resent = outcomes(closing(2), resends=True)
    assert seen == {200}
    assert resent >= 3


def test_nothing_is_sent_again_unless_asked():
    seen, resent = outcomes(closing(2))
    assert (seen, resent) == ({200, "RemoteDisconnected"}, 0)


@pytest.mark.parametrize(
    ("behavior", "failure"),
    [
        (closing(0), "RemoteDisconnected"),  # on a new connection
        (closing(3, part=ANSWER[:-1]), "IncompleteRead"),
        pytest.param(  # as of a request in flight
            closing(9, seconds=2 * Traffic.CLOSING_SECONDS), "RemoteDisconnected", marks=pytest.mark.slow
        ),
    ],
)
def test_request_that_the_server_may_have_begun_to_answer_is_not_sent_again(behavior: Behavior, failure: str):
    seen, resent = outcomes(behavior, resends=True)
    assert seen - {200} == {failure}
    assert resent == 0
