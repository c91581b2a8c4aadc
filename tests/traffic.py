"""Constant load, and its outcomes.

It needs only the standard library: the tests of a cluster run this file in a pod, as a program.
"""

import json
import select
import socket
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed an idle connection."""
    return bool(select.select([connection], [], [], 0)[0])


class Traffic:
    """Clients that send one input repeatedly until the block ends, and count the outcomes.

    Args:
        resends: whether a request is sent again, once, on a new connection, if the server closes a kept connection as
            the request comes, as browsers and most HTTP clients do: `CLOSING_SECONDS` later at most, and without a byte
            of an answer. A server that closes it later may have been at work on the request.
        keeps: whether a client keeps its connection. Otherwise, each request opens one.

    Attributes:
        counts: the number of requests with each outcome: a status, "wrong answer", or an exception's name.
        resent: the number of requests that were sent again.
        longest: the seconds that the slowest answer took.
    """

    CLOSING_SECONDS = 2.0  # takes less than a millisecond, unless the machine is busy
    ANSWER_SECONDS = 120

    def __init__(
        self,
        url: str,
        content: bytes,
        expected: str,
        clients: int = 4,
        pause: float = 0.01,
        resends: bool = False,
        keeps: bool = True,
    ):
        self.url, self.content, self.expected, self.pause, self.resends = url, content, expected, pause, resends
        self.headers = {} if keeps else {"Connection": "close"}
        self.resent, self.longest = 0, 0.0
        self.counts: Counter[int | str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]

    def _client(self) -> None:
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=self.ANSWER_SECONDS)
        while not self._stop.wait(self.pause):
            self.counts[self._outcome(connection)] += 1
        connection.close()

    def _outcome(self, connection: HTTPConnection) -> int | str:
        began = time.monotonic()
        try:
            answer = self._send(connection)
            body = answer.read().decode(errors="replace")
        except (OSError, HTTPException) as exc:
            connection.close()
            return type(exc).__name__
        self.longest = max(self.longest, time.monotonic() - began)
        return answer.status if answer.status != 200 or self.expected in body else "wrong answer"

    def _send(self, connection: HTTPConnection) -> HTTPResponse:
        kept = connection.sock is not None and not is_closed(connection.sock)
        if not kept:
            connection.close()  # the next request opens it
        began = time.monotonic()
        try:
            return self._post(connection)
        except (ConnectionResetError, BrokenPipeError):  # http.client's RemoteDisconnected is one of them
            if not (self.resends and kept and time.monotonic() - began < self.CLOSING_SECONDS):
                raise
            self.resent += 1
            connection.close()
            return self._post(connection)

    def _post(self, connection: HTTPConnection) -> HTTPResponse:
        connection.request("POST", urlsplit(self.url).path, self.content, self.headers)
        return connection.getresponse()

    def wait_for(self, requests: int) -> None:
        """Wait until this number of further requests has an outcome."""
        goal = self.counts.total() + requests
        deadline = time.monotonic() + 60
        while self.counts.total() < goal:
            assert time.monotonic() < deadline, self.counts
            time.sleep(0.05)

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self.ANSWER_SECONDS + 10)


def main(url: str, file: str, expected: str) -> None:
    """Send a file until the process is killed, and print a line of JSON each second: all counts since the start."""
    content = Path(file).read_bytes()
    with (
        Traffic(url, content, expected, clients=2, pause=0.02, resends=True) as kept,
        Traffic(url, content, expected, clients=2, pause=0.02, keeps=False) as fresh,
    ):
        while True:
            time.sleep(1)
            counts = kept.counts.copy() + fresh.counts.copy()  # clients count on meanwhile
            longest = max(kept.longest, fresh.longest)
            print(json.dumps({"counts": counts, "resent": kept.resent, "longest": longest}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
