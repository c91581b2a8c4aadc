"""The server whose models the page offers: where it is, whether it asks for a key, which models it has."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from bundle.errors import BundleError, NotRunning
from bundle.server.http import SECONDS, session
from bundle.server.keys import Keys
from page.schema import Model, models


@dataclass(frozen=True)
class Connection:
    """How to reach a server: its URL, and what adds its key to a request, if it requires one."""

    url: str
    auth: Callable[[requests.PreparedRequest], requests.PreparedRequest] | None = None


@dataclass(frozen=True)
class Served:
    """The server that `make serve` started here.

    Attributes:
        record: the file in which `make serve` describes it.
    """

    record: Path

    def connect(self) -> Connection:
        """Return how to reach the server. The record is read at each call, because a restart changes it.

        Raises:
            NotRunning: there is no record.
        """
        try:
            recorded = json.loads(self.record.read_text())
        except (OSError, ValueError) as exc:
            raise NotRunning("TorchServe is not running. Start it: make serve") from exc
        keys = Keys(Path(recorded["key_file"]), recorded["management"]) if recorded["key_file"] else None
        return Connection(recorded["inference"], partial(signed, keys) if keys else None)

    def models(self) -> dict[str, Model]:
        """Return the models by name, in the server's order.

        Raises:
            NotRunning: the server does not answer.
            BundleError: it does not describe its models.
        """
        connection = self.connect()
        document = f"{connection.url}/openapi.json"
        try:
            answer = session.get(document, auth=connection.auth, timeout=SECONDS)
        except requests.ConnectionError as exc:
            raise NotRunning(f"No server answers at {connection.url}. Start it: make serve") from exc
        if not answer.ok:
            raise BundleError(f"{document} answers {answer.status_code}: nothing describes the models.")
        return {model.name: model for model in models(answer.json())}


def signed(keys: Keys, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the inference key to a request."""
    request.headers["Authorization"] = keys.header("inference")
    return request
