"""`bundle run` of a pod whose volumes, Secrets or image are wrong: one message names the cause, and nothing starts."""

import json
import os
import re
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bundle.catalog import select
from bundle.cli.app import app
from bundle.errors import BundleError
from bundle.mar import MANIFEST
from bundle.server.ports import free_ports
from bundle.server.process import Server
from bundle.signing import seal
from bundle.supervisor.gate import own_addresses
from bundle.supervisor.supervisor import Options, Supervisor, install_archives
from tests import programs

[MNIST] = select(["mnist"])
PORTS = ("INFERENCE_ADDRESS", "MANAGEMENT_ADDRESS", "METRICS_ADDRESS", "GRPC_INFERENCE_PORT", "GRPC_MANAGEMENT_PORT")
FULL_BYTES = 2**14


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of a pod: `archives` has one of mnist, and `store` is empty."""
    for name in ("archives", "store", "gate"):
        (tmp_path / name).mkdir()
    archive = tmp_path / "archives" / "mnist.mar"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr(MANIFEST, json.dumps({"model": {"modelName": "mnist", "modelVersion": "1.0"}}))
        made.writestr("weights", os.urandom(2 * FULL_BYTES))
    seal(archive, None)
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BUNDLE_ARCHIVES", str(tmp_path / "archives"))
    monkeypatch.setenv("BUNDLE_GATE", str(tmp_path / "gate"))
    *ports, own = free_ports(len(PORTS) + 1)
    monkeypatch.setenv("BUNDLE_ADDRESS", f"127.0.0.1:{own}")
    for name, port in zip(PORTS, ports, strict=True):
        monkeypatch.setenv(f"TS_{name}", str(port) if "PORT" in name else f"http://127.0.0.1:{port}")
    monkeypatch.delenv("TRUSTED_KEY", raising=False)
    return tmp_path


@contextmanager
def full_disk(free: int = FULL_BYTES) -> Iterator[None]:
    """Make writes fail as on a full disk, with an OSError: no file can become larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_refused(volumes: Path, message: str, model: str = "mnist", status: int = 1) -> None:
    ended = programs.run(app, "run", model)
    assert (ended.status, ended.stderr) == (status, f"error: {message}\n")
    assert not (volumes / "run" / "server.json").exists()


def test_claim_without_the_archive_is_named(volumes: Path):
    (volumes / "archives" / "mnist.mar").unlink()
    message = f"There is no archive of mnist in {volumes}/store or {volumes}/archives. Build it: make archive"
    assert_refused(volumes, message)
    (volumes / "archives").rmdir()
    assert_refused(volumes, message)


def test_model_that_the_image_does_not_have_is_named(volumes: Path):
    ended = programs.run(app, "run", "digits")
    assert ended.status == 2
    assert ended.stderr.startswith("error: There is no model 'digits' in models/; there are: ")


def test_archive_that_was_changed_is_named_and_does_not_replace_the_stores(volumes: Path):
    archive, store = volumes / "archives" / "mnist.mar", volumes / "store"
    served = Path(shutil.copy(archive, store))
    good = archive.read_bytes()
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("added.py", "")
    ended = programs.run(app, "run", "mnist")
    assert ended.status == 1
    assert ended.stderr.startswith("error: mnist.mar is refused: 'added.py' was added. ")
    archive.write_bytes(b"half")
    assert_refused(volumes, f"{archive} is not a model archive: File is not a zip file")
    assert [(file, file.read_bytes()) for file in store.iterdir()] == [(served, good)]
    served.unlink()
    assert_refused(volumes, "mnist.mar is refused: it cannot be read: File is not a zip file.")
    assert list(store.iterdir()) == []


def test_archive_of_another_servers_model_is_not_checked(volumes: Path):
    (volumes / "archives" / "text.mar").write_bytes(b"half")
    install_archives(volumes / "archives", volumes / "store", {"mnist"}, print)
    assert (volumes / "store" / "mnist.mar").is_file()


def test_missing_key_is_named(volumes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRUSTED_KEY", "/run/trusted/trusted.pub")
    message = "TRUSTED_KEY is '/run/trusted/trusted.pub', and there is no such file. Make a pair of keys: make keygen"
    assert_refused(volumes, message)
    wanted = f"mnist=https://models.example/mnist.mar#sha256={'0' * 64}"
    assert programs.run(app, "fetch", wanted, "--into", "x").stderr == f"error: {message}\n"


def test_full_volume_of_the_store_is_named(volumes: Path):
    with full_disk(), pytest.raises(BundleError) as refused:
        install_archives(volumes / "archives", volumes / "store", {"mnist"}, print)
    archive, store = volumes / "archives" / "mnist.mar", volumes / "store"
    assert str(refused.value) == f"{archive} cannot be copied into {store}: File too large."
    assert list(store.iterdir()) == []
    install_archives(volumes / "archives", volumes / "store", {"mnist"}, print)  # the next start, with room
    assert (store / "mnist.mar").read_bytes() == archive.read_bytes()


def test_full_folders_for_temporary_files_are_named(volumes: Path, monkeypatch: pytest.MonkeyPatch):
    install_archives(volumes / "archives", volumes / "store", {"mnist"}, print)
    monkeypatch.setattr(tempfile, "tempdir", None)  # as in a new process
    with full_disk(0):
        ended = programs.run(app, "run", "mnist")
    assert ended.status == 1
    assert re.fullmatch(
        r"error: No folder for temporary files can be written: No usable temporary directory found in \[.*\]\. "
        r"Free some space in one of them, or set TMPDIR to another folder\.\n",
        ended.stderr,
    )


def test_gate_that_cannot_be_closed_is_named(volumes: Path):
    (volumes / "gate").rmdir()
    file = volumes / "gate" / f"closed-{own_addresses()[0]}"
    assert_refused(volumes, f"{file} cannot be made: No such file or directory. It keeps requests away.")


def test_full_volume_of_the_state_is_reported_and_the_server_goes_on(volumes: Path):
    said: list[str] = []
    workers = {"m" * FULL_BYTES: 1}  # too long a state
    options = Options("127.0.0.1", 0, volumes / "state.json", None, 1, 1, 1, 1, workers)
    with full_disk():
        Supervisor(Server(), options, said.append).save()
    assert [line.split(":")[0] for line in said] == ["the state could not be saved"]
    assert "File too large" in said[0]
    assert not (volumes / "state.json").exists()
