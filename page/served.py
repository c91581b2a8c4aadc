"""The server whose models the page offers: where it is, whether it asks for a key, which models it has."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import requests

from bundle.errors import BundleError, NotRunning
from bundle.server.http import SECONDS, session
from bundle.server.keys import Keys
from page.call import Call, Reply
from page.schema import Model, models

HOUR = 60 * 60  # s


class KeyRequired(BundleError):
    """The server requires a key, and the person in front of the page has given none, or a wrong one."""


@dataclass(frozen=True)
class Connection:
    """How to reach a server: its URL, and what adds its key to a request, if it requires one."""

    url: str
    auth: Callable[[requests.PreparedRequest], requests.PreparedRequest] | None = None


class Served(ABC):
    """A server whose models the page offers.

    Attributes:
        path: where the page is, in the URL that browsers open.
        start: the command that starts the server.
        kept: for how many seconds the files are kept that people send.
    """

    path: ClassVar[str]
    start: ClassVar[str]
    kept: ClassVar[int]

    @abstractmethod
    def connect(self, key: str = "") -> Connection:
        """Return how to reach the server.

        Args:
            key: what the person in front of the page has typed in.

        Raises:
            BundleError: the server is not running, or the key is invalid.
        """

    @abstractmethod
    def repeatable(self, call: Call, origin: str) -> Call:
        """Return the call as the person in front of the page can repeat it.

        Args:
            origin: of the page in the person's browser, such as http://127.0.0.1:8080.
        """

    def models(self, key: str = "") -> dict[str, Model]:
        """Return the models by name, in the server's order.

        Raises:
            NotRunning: the server does not answer.
            KeyRequired: it requires a key, and this is not a valid one.
            BundleError: it does not describe its models.
        """
        connection = self.connect(key)
        try:
            answer = session.get(f"{connection.url}/openapi.json", auth=connection.auth, timeout=SECONDS)
        except requests.ConnectionError as exc:
            raise NotRunning(f"No server answers at {connection.url}. Start it: {self.start}") from exc
        reply = Reply(answer.status_code, answer.content, answer.elapsed.total_seconds())
        if reply.refuses_key:
            raise KeyRequired("The server does not accept this key." if key else "The server requires a key.")
        if not answer.ok:
            raise BundleError(f"Nothing describes the models: /openapi.json answers {reply.error()}")
        return {model.name: model for model in models(answer.json())}


@dataclass(frozen=True)
class Recorded(Served):
    """The server that `make serve` started here.

    Attributes:
        record: the file in which `make serve` describes it.
    """

    path = "/"
    start = "make serve"
    kept = 24 * HOUR  # what people copy from the page names the files

    record: Path

    def connect(self, key: str = "") -> Connection:
        """Return how to reach the server. The record is read at each call, because a restart changes it.

        Raises:
            NotRunning: there is no record.
            KeyRequired: the key is invalid.
        """
        try:
            recorded = json.loads(self.record.read_text())
        except (OSError, ValueError) as exc:
            raise NotRunning(f"TorchServe is not running. Start it: {self.start}") from exc
        if recorded["key_file"] and not key:
            keys = Keys(Path(recorded["key_file"]), recorded["management"])
            return Connection(recorded["inference"], adding(partial(keys.header, "inference")))
        return Connection(recorded["inference"], typed(key))

    def repeatable(self, call: Call, origin: str) -> Call:
        """Return the call itself: the person is at this machine, or knows its address."""
        return call


@dataclass(frozen=True)
class Proxied(Served):
    """The models of the Docker stack. The page is behind the proxy, and asks them through it as any other client.

    It has no key of its own: it would lend it to whoever opens the page.

    Attributes:
        url: of the proxy, inside the stack.
    """

    path = "/page"  # docker/nginx/nginx.conf passes it on unchanged
    start = "make up PAGE=1"
    kept = HOUR

    url: str

    def connect(self, key: str = "") -> Connection:
        return Connection(self.url, typed(key))

    def repeatable(self, call: Call, origin: str) -> Call:
        """Return the call to the proxy as the browser knows it, with the files of the person's own folder."""
        files = {name: Path(file.name) for name, file in call.files.items()}
        return call.but(url=origin + call.url.removeprefix(self.url), files=files)


def typed(key: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest] | None:
    """Return what adds a key that a person typed in; None without a key.

    Raises:
        KeyRequired: no key has such characters, and no header can.
    """
    if not key.isascii() or not key.isprintable():
        raise KeyRequired("The server does not accept this key.")
    return adding(lambda: f"Bearer {key}") if key else None


def adding(header: Callable[[], str]) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Return what adds an Authorization header to a request. The header is asked for at each request."""

    def add(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = header()
        return request

    return add
