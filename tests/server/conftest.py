"""A real TorchServe on free ports, started and stopped by the bundle's own commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundle.paths import MODEL_STORE, MODELS
from bundle.server.client import Client, first_class
from bundle.server.keys import Keys
from bundle.server.settings import Settings
from bundle.signing import make_keys

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("mnist", "image", "audio", "text")  # whatever else a user has put into models/


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@dataclass(frozen=True)
class Place:
    """Where a server of the tests lives: its own ports and its own run folder.

    Attributes:
        environment: what makes the bundle's commands work on this server.
        ports: by their keys in config.properties.
    """

    environment: dict[str, str]
    ports: dict[str, int]

    @property
    def client(self) -> Client:
        management = self.url("management_address")
        return Client(
            self.url("inference_address"), management, Keys(self.keys, management) if self.keys.exists() else None
        )

    @property
    def keys(self) -> Path:
        """The keys of a server that asks for them."""
        return Path(self.environment["RUN_DIR"]) / "key_file.json"

    def url(self, key: str) -> str:
        return f"http://127.0.0.1:{self.ports[key]}"

    def bundle(self, *arguments: str, **overrides: str) -> subprocess.CompletedProcess:
        """Runs `python -m bundle ...` for this server."""
        return subprocess.run(
            [sys.executable, "-m", "bundle", *arguments],
            cwd=ROOT,
            env={**self.environment, **overrides},
            capture_output=True,
            text=True,
            timeout=400,
        )


def new_place(run_dir: Path) -> Place:
    settings = Settings.isolated(MODEL_STORE)
    ports = {key: port for key, (_, port) in settings.listeners().items()}
    return Place({**os.environ, **settings.overrides, "RUN_DIR": str(run_dir), "COLUMNS": "160"}, ports)


@contextmanager
def serving(place: Place, *models: str) -> Iterator[None]:
    """A server of these models while the block runs."""
    started = place.bundle("serve", *models)
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        yield
    finally:
        stopped = place.bundle("stop")
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server with the four models, shared by the tests; a test leaves it as it found it."""
    place = new_place(tmp_path_factory.mktemp("served"))
    with serving(place, *SHIPPED):
        yield place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Room for a server that a test starts by itself."""
    place = new_place(tmp_path / "run")
    try:
        yield place
    finally:
        place.bundle("stop")


@pytest.fixture
def store(served: Place, tmp_path: Path) -> Path:
    """A model store of the test's own, with the archive of MNIST."""
    store = tmp_path / "store"
    store.mkdir()
    for file in MODEL_STORE.glob("mnist.*"):
        shutil.copy(file, store)
    return store


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key, for signing; the public one is beside it."""
    file = tmp_path_factory.mktemp("keys") / "signing.key"
    make_keys(file)
    return file


@pytest.fixture(scope="session")
def trusting(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[Place]:
    """A server of MNIST that trusts the key, out of a store of its own; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("trusting")
    (folder / "store").mkdir()
    place = new_place(folder / "run")
    place.environment.update(SIGNING_KEY=str(key), TRUSTED_KEY=f"{key}.pub", TS_MODEL_STORE=str(folder / "store"))
    with serving(place, "mnist"):
        yield place


@pytest.fixture
def good(trusting: Place) -> Iterator[Path]:
    """The signed archive that it serves. Whatever a test had refused, it still does, and serves nothing else."""
    archive = Path(trusting.environment["TS_MODEL_STORE"]) / "mnist.mar"
    yield archive
    answer = trusting.client.predict("mnist", (MODELS / "mnist" / "sample.png").read_bytes())
    assert first_class(answer.json()) == "3"
    assert trusting.client.models() == ["mnist"]
    for file in archive.parent.iterdir():
        if file.stem != "mnist":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
