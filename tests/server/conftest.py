"""Fixtures: archives, and TorchServe servers on free ports, started and stopped by the bundle's own commands."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.paths import MODEL_STORE, MODELS
from bundle.samples import first
from bundle.signing import make_keys
from tests.server.bare import MODELS as BARE_MODELS
from tests.server.bare import ONE_THREAD, Bare, bare
from tests.server.place import Place, mnist_place, new_place, serving
from tests.shipped import ON_REQUEST, SHIPPED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archives of the shipped models. Up-to-date ones are copied from model_store/."""
    folder = tmp_path_factory.mktemp("archives")
    for name in SHIPPED:
        for file in MODEL_STORE.glob(f"{name}.*"):
            shutil.copy(file, folder)
    built = new_place(tmp_path_factory.mktemp("run"), folder).bundle("archive", *SHIPPED)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="session")
def served(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of the shipped models. All tests share it; a test must undo its changes."""
    folder = tmp_path_factory.mktemp("served")
    place = new_place(folder / "run", shutil.copytree(archives, folder / "store"))
    with serving(place, *SHIPPED):
        yield place


@pytest.fixture(scope="session")
def served_on_request(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of the models that are served on request. All tests share it; a test must undo its changes."""
    folder = tmp_path_factory.mktemp("on-request")
    place = new_place(folder / "run", folder / "store")
    with serving(place, *ON_REQUEST):
        yield place


@pytest.fixture
def place(archives: Path, tmp_path: Path) -> Iterator[Place]:
    """A place for a server that the test starts. Its store has the archive of MNIST."""
    place = mnist_place(tmp_path, archives)
    try:
        yield place
    finally:
        place.bundle("stop")


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private signing key. The public key is in the same folder, with the suffix .pub."""
    file = tmp_path_factory.mktemp("keys") / "signing.key"
    make_keys(file)
    return file


@pytest.fixture(scope="session")
def trusting(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[Place]:
    """A server of MNIST that accepts only archives signed with the key. A test must undo its changes."""
    folder = tmp_path_factory.mktemp("trusting")
    (folder / "store").mkdir()
    place = new_place(folder / "run", folder / "store")
    place.environment.update(SIGNING_KEY=str(key), TRUSTED_KEY=f"{key}.pub")
    with serving(place, "mnist"):
        yield place


@pytest.fixture
def good(trusting: Place) -> Iterator[Path]:
    """The signed archive that `trusting` serves. After the test, the server must still serve it, and nothing else."""
    archive = trusting.store / "mnist.mar"
    yield archive
    answer = trusting.client.predict("mnist", (MODELS / "mnist" / "sample.png").read_bytes())
    assert first(answer.json()).label == "3"
    assert trusting.client.models() == ["mnist"]
    for file in archive.parent.iterdir():
        if file.stem != "mnist":
            shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """A bare server with the patches of the frontend. All tests share it; a test must undo its changes."""
    with bare(tmp_path_factory.mktemp("patched"), BARE_MODELS, **ONE_THREAD) as server:
        yield server


@pytest.fixture(scope="session")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    """The same without the patches, and with fewer models."""
    models = {name: BARE_MODELS[name] for name in ("one", "batches", "late")}
    with bare(tmp_path_factory.mktemp("unpatched"), models, off="all", **ONE_THREAD) as server:
        yield server
