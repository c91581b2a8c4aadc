"""Helpers of several test suites: changed archives, waiting, and constant load."""

import json
import select
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import requests
from prometheus_client.parser import text_string_to_metric_families

from bundle import mar
from bundle.catalog import CONFIG_NAME
from bundle.paths import MODELS
from bundle.signing import UNSEALED, seal


def altered(archive: Path, target: Path, members: dict[str, bytes | None]) -> Path:
    """Write a copy of an archive with these members and new checksums; None removes a member."""
    mar.rewrite(archive, target, members | UNSEALED)
    seal(target, None)
    return target


def reversioned(archive: Path, version: str, target: Path, without: str = "") -> Path:
    """Write a copy with another version, without the member `without`."""
    manifest = json.loads(mar.read(archive, mar.MANIFEST))
    manifest["model"]["modelVersion"] = version
    return altered(archive, target, {mar.MANIFEST: json.dumps(manifest).encode(), without: None})


def models_expecting_four(models: Path) -> Path:
    """Make a models folder whose MNIST expects the answer 4, and return it. The model answers 3."""
    shutil.copytree(MODELS / "mnist", models / "mnist")
    config = models / "mnist" / CONFIG_NAME
    old = config.read_text()
    config.write_text(old.replace('expect: "3"', 'expect: "4"'))
    assert config.read_text() != old
    return models


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was still false after {seconds:g} s"
        time.sleep(0.2)


def batches(metrics: str, model: str) -> tuple[float, float]:
    """How many batches a model has answered, and how many requests were in them.

    Args:
        metrics: URL of the metrics API.
    """
    exposed = requests.get(f"{metrics}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(exposed) for sample in family.samples]

    def total(name: str) -> float:
        return sum(one.value for one in samples if one.name == name and one.labels["ModelName"] == model)

    return total("bundle_batch_size_count"), total("bundle_batch_size_sum")


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed an idle connection."""
    return bool(select.select([connection], [], [], 0)[0])


class Traffic:
    """Clients that send one input repeatedly until the block ends, and count the outcomes.

    Args:
        resends: whether a request is sent again, once, on a new connection, if the server closes a kept connection as
            the request comes, as browsers and most HTTP clients do: `CLOSING_SECONDS` later at most, and without a byte
            of an answer. A server that closes it later may have been at work on the request.

    Attributes:
        counts: the number of requests with each outcome: a status, "wrong answer", or an exception's name.
        resent: the number of requests that were sent again.
        longest: the seconds that the slowest answer took.
    """

    CLOSING_SECONDS = 0.5  # takes less than a millisecond, unless the machine is busy
    ANSWER_SECONDS = 120

    def __init__(
        self, url: str, content: bytes, expected: str, clients: int = 4, pause: float = 0.01, resends: bool = False
    ):
        self.url, self.content, self.expected, self.pause, self.resends = url, content, expected, pause, resends
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
        connection.request("POST", urlsplit(self.url).path, self.content)
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
