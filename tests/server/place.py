"""Servers of the tests: each has free ports, a run folder and a model store."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bundle.paths import MODEL_STORE, ROOT
from bundle.server.client import Client
from bundle.server.keys import Keys
from bundle.server.settings import Settings


@dataclass(frozen=True)
class Place:
    """The environment of one server.

    Attributes:
        environment: the variables with which the bundle's commands use this server.
        ports: the ports, by their keys in config.properties.
    """

    environment: dict[str, str]
    ports: dict[str, int]

    @property
    def run_dir(self) -> Path:
        return Path(self.environment["RUN_DIR"])

    @property
    def store(self) -> Path:
        return Path(self.environment["TS_MODEL_STORE"])

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def keys(self) -> Path:
        """The file with the keys of a server that requires tokens."""
        return self.run_dir / "key_file.json"

    @property
    def client(self) -> Client:
        management = self.url("management_address")
        keys = Keys(self.keys, management) if self.keys.exists() else None
        return Client(self.url("inference_address"), management, keys)

    def url(self, key: str) -> str:
        return f"http://127.0.0.1:{self.ports[key]}"

    def record(self) -> dict:
        """Return what `serve` recorded about the running server."""
        return json.loads((self.run_dir / "server.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Return all processes that have this run folder in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RUN_DIR") == str(self.run_dir):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def bundle(self, *arguments: str, **overrides: str) -> subprocess.CompletedProcess:
        """Run `python -m bundle ...` for this server.

        Args:
            overrides: further environment variables.
        """
        return subprocess.run(
            [sys.executable, "-m", "bundle", *arguments],
            cwd=ROOT,
            env={**self.environment, **overrides},
            capture_output=True,
            text=True,
            timeout=400,
        )


def new_place(run_dir: Path, store: Path = MODEL_STORE) -> Place:
    settings = Settings.isolated(store)
    ports = {key: port for key, (_, port) in settings.listeners().items()}
    return Place({**os.environ, **settings.overrides, "RUN_DIR": str(run_dir), "COLUMNS": "160"}, ports)


def mnist_place(folder: Path, archives: Path) -> Place:
    """Make a place in the folder, whose store has the archive of MNIST."""
    store = folder / "store"
    store.mkdir()
    for file in archives.glob("mnist.*"):
        shutil.copy(file, store)
    return new_place(folder / "run", store)


@contextmanager
def serving(place: Place, *models: str) -> Iterator[None]:
    """Serve the models while the block runs."""
    started = place.bundle("serve", *models)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield
    finally:
        stopped = place.bundle("stop")
        assert stopped.returncode == 0, stopped.stderr
