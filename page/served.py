"""The server whose models the page offers: where it is, whether it asks for a key, which models it has."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from bundle.errors import BundleError, NotRunning
from bundle.server.http import SECONDS, session
from bundle.server.keys import Keys
from page.schema import Model, models

DOCUMENT = "openapi.json"  # a route of the server, and a file in each archive


@dataclass(frozen=True)
class Connection:
    """How to reach a server: its URL, and what adds its key to a request, if it requires one."""

    url: str
    auth: Callable[[requests.PreparedRequest], requests.PreparedRequest] | None = None


@dataclass(frozen=True)
class Served:
    """A server: one with a URL, or the one that `make serve` started here.

    Attributes:
        url: of its inference API; "" for the one in `record`.
        record: the file in which `make serve` describes its server.
        store: the folder of its archives.
    """

    url: str
    record: Path
    store: Path

    def connect(self) -> Connection:
        """Return how to reach the server. The record is read at each call, because a restart changes it.

        Raises:
            NotRunning: there is no record.
        """
        if self.url:
            return Connection(self.url.rstrip("/"))
        recorded = self.recorded()
        keys = Keys(Path(recorded["key_file"]), recorded["management"]) if recorded["key_file"] else None
        return Connection(recorded["inference"], partial(signed, keys) if keys else None)

    def recorded(self) -> dict:
        try:
            return json.loads(self.record.read_text())
        except (OSError, ValueError) as exc:
            raise NotRunning("TorchServe is not running. Start it: make serve") from exc

    def models(self) -> dict[str, Model]:
        """Return the models by name, in the server's order.

        Raises:
            NotRunning: the server does not answer.
            BundleError: it does not describe its models.
        """
        return {model.name: model for document in self.documents() for model in models(document)}

    def documents(self) -> list[dict]:
        """Return the OpenAPI documents of the models: the server's, or else those in the archives that it serves."""
        connection = self.connect()
        try:
            answer = session.get(f"{connection.url}/{DOCUMENT}", auth=connection.auth, timeout=SECONDS)
        except requests.ConnectionError as exc:
            raise NotRunning(f"No server answers at {connection.url}. Start it: make serve") from exc
        if answer.ok:
            return [answer.json()]
        if self.url:
            raise BundleError(
                f"{connection.url}/{DOCUMENT} answers {answer.status_code}: nothing describes its models."
            )
        archives = (self.store / f"{name}.mar" for name in self.recorded()["served"])
        return [document for document in map(in_archive, archives) if document]


def signed(keys: Keys, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the inference key to a request."""
    request.headers["Authorization"] = keys.header("inference")
    return request


def in_archive(archive: Path) -> dict | None:
    """Return the document in an archive; None if it has none, because its handler does not declare its inputs."""
    with zipfile.ZipFile(archive) as file:
        return json.loads(file.read(DOCUMENT)) if DOCUMENT in file.namelist() else None
