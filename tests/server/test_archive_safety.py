"""Registration through the management API: changed, unsigned and foreign archives never run.

TorchServe handles a registration without the bundle: it unpacks the archive, and answers when its workers are READY or
have failed. The guard that starts each worker checks the unpacked archive. If it refuses the archive, none of its code
runs, the log has the reason, and TorchServe answers 500. (If the registration did not wait for workers, it is answered
200, and none becomes READY.) test_archive_starts.py has the same checks for `serve`, `run` and `rollout`.
"""

import http.server
import json
import os
import shutil
import signal
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import requests

from bundle import mar
from bundle.catalog import select
from bundle.samples import first
from bundle.server.readiness import worker_failure
from bundle.signing import UNSEALED, seal
from tests.altered import REFUSED, another_handler, every_refusal, leaves_a_mark
from tests.server.place import Place
from tests.support import wait_for

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
LOGGED = 60  # seconds, because TorchServe writes its logs in the background


@pytest.fixture
def store(good: Path) -> Path:
    return good.parent


def register(place: Place, url: str, name: str = "elsewhere", api: str = "models", **options: str) -> requests.Response:
    named = {"url": url, "model_name" if api == "models" else "workflow_name": name, "synchronous": "true"}
    return requests.post(f"{place.client.management}/{api}", params=named | options, timeout=300)


# --- sources of archives -------------------------------------------------------------------------------------------


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Serve the archive, redirect /redirect to it, and record the requested paths."""

    requested: list[str] = []
    archive: Path

    def do_GET(self) -> None:
        self.requested.append(self.path)
        self.send_response(302 if "redirect" in self.path else 200)
        if "redirect" in self.path:
            self.send_header("Location", "/mnist.mar")
        self.end_headers()
        self.wfile.write(self.archive.read_bytes())


@pytest.fixture
def elsewhere(good: Path) -> Iterator[str]:
    Elsewhere.archive = good
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("api", ["models", "workflows"])
@pytest.mark.parametrize(
    "url",
    [
        "http://{elsewhere}/other.{kind}",
        "http://{elsewhere}/redirect.{kind}",
        "https://{elsewhere}/other.{kind}",
        "HTTP://{elsewhere}/other.{kind}",
        "ftp://{elsewhere}/other.{kind}",
        "file://{outside}/other.{kind}",
        "file:{outside}/other.{kind}",
        "{outside}/other.{kind}",
        "../outside/other.{kind}",
        "..%2Foutside%2Fother.{kind}",
        "%2e%2e/outside/other.{kind}",
        "store/../../outside/other.{kind}",
        "..\\outside\\other.{kind}",
        "nowhere.{kind}",
    ],
)
def test_register_archive_outside_the_store_is_404_and_fetches_nothing(trusting, good, elsewhere, url: str, api: str):
    kind = {"models": "mar", "workflows": "war"}[api]
    outside = good.parents[1] / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(good, outside / f"other.{kind}")
    Elsewhere.requested.clear()
    registered = register(trusting, url.format(elsewhere=elsewhere, outside=outside, kind=kind), api=api)
    assert registered.status_code == 404, registered.text
    assert not Elsewhere.requested
    assert list(good.parent.glob("other*")) == []


def wait_for_failure(place: Place, model: str, text: str) -> None:
    """Wait until the log has a failure of one of the model's workers with this text."""
    wait_for(lambda: text in str(worker_failure(place.logs, model)), LOGGED)


@pytest.mark.parametrize("where", ["outside", "in the store"])
def test_register_folder_starts_no_worker(trusting: Place, good: Path, store: Path, tmp_path: Path, where: str):
    """Refuse a folder even if it holds exactly what was signed.

    TorchServe accepts any absolute path of a folder, and the name of a folder in the store. It ignores `allowed_urls`.
    """
    folder = mar.unpack(good, tmp_path / "other" if where == "outside" else store / "other")
    registered = register(trusting, str(folder) if where == "outside" else "other")
    assert registered.status_code == 500, registered.text
    wait_for_failure(
        trusting, "elsewhere", f"{folder} is refused: it was not unpacked from an archive of the model store"
    )


def test_register_folder_with_its_own_python_never_runs_it(trusting: Place, good: Path, tmp_path: Path):
    """Answer 400, and keep the model registered without a worker.

    With `useVenv`, TorchServe starts workers with venv/bin/python in the parent of the model's folder. The folder here
    is named `venv`, so that this Python is one of its own files. But TorchServe first creates the venv with the Python
    that it is configured with, which is the guard, and that fails.
    """
    folder = mar.unpack(good, tmp_path / "venv")
    config = folder / "model-config.yaml"
    config.write_text(f"useVenv: true\n{config.read_text()}")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\ntouch {tmp_path / 'mark'}\n")
    (folder / "bin" / "python").chmod(0o755)
    registered = register(trusting, str(folder))
    assert registered.status_code == 400, registered.text
    assert trusting.client.workers("elsewhere").ready == 0
    trusting.client.unregister("elsewhere", "1.0")
    wait_for(lambda: "Packages are not installed for a model" in (trusting.logs / "ts_log.log").read_text(), LOGGED)
    assert not (tmp_path / "mark").exists()


def test_register_with_a_handler_outside_the_archive_never_runs_it(trusting: Place, tmp_path: Path):
    """TorchServe puts the folder of the named handler first on the worker's PYTHONPATH."""
    for name in ("other.py", "sitecustomize.py"):
        (tmp_path / name).write_bytes(leaves_a_mark(tmp_path / "mark"))
    registered = register(trusting, "mnist.mar", handler=f"{tmp_path}/other.py:handle")
    assert registered.status_code == 500, registered.text
    assert not (tmp_path / "mark").exists()


# --- contents of archives ------------------------------------------------------------------------------------------


def test_register_signed_archive_with_either_runtime_is_served_and_scales(trusting: Place, good: Path):
    """Workers leave no file in their folder that the guard refuses at their next start."""
    for runtime in ("python", "python3"):
        assert register(trusting, "mnist.mar", runtime=runtime).status_code == 200
        trusting.client.scale("elsewhere", "1.0", 3, 3)
        wait_for(lambda: trusting.client.workers("elsewhere").ready == 3)
        assert first(trusting.client.predict("elsewhere", DIGIT).json()).label == MNIST.bundle.expect
        trusting.client.unregister("elsewhere", "1.0")


def test_worker_of_a_handler_that_writes_data_into_its_folder_comes_back(
    trusting: Place, good: Path, store: Path, key: Path
):
    handler = mar.read(good, "mnist.py") + b'\n\nopen("cache.txt", "a").write("x")\n'
    seal(mar.rewrite(good, store / "other.mar", {"mnist.py": handler} | UNSEALED), key)
    assert register(trusting, "other.mar", "writing").status_code == 200

    def workers() -> set[int]:
        found = trusting.client.describe("writing")["workers"]
        return {worker["pid"] for worker in found if worker["status"] == "READY"}

    before = workers()
    killed = min(before)
    written = Path(f"/proc/{killed}/cwd").readlink() / "cache.txt"
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: len(workers() - {killed}) == len(before))
    assert len(written.read_text()) > len(before)
    assert first(trusting.client.predict("writing", DIGIT).json()).label == MNIST.bundle.expect
    trusting.client.unregister("writing", "1.0")


@every_refusal
def test_register_refused_archive_is_500(trusting: Place, good: Path, store: Path, wrong: Callable[[Path, Path], Path]):
    wrong(good, store / "other.mar")
    for options in ({}, {"runtime": "python3"}):
        registered = register(trusting, "other.mar", wrong.__name__, **options)
        assert registered.status_code == 500, registered.text
    failure = f"A worker of {wrong.__name__} failed: BundleError: The unpacked archive is refused: "
    wait_for_failure(trusting, wrong.__name__, failure)
    assert REFUSED[wrong] in str(worker_failure(trusting.logs, wrong.__name__))
    assert not (store / "mark").exists()


def test_register_refused_archive_without_workers_never_becomes_ready(trusting: Place, good: Path, store: Path):
    """TorchServe answers 200, because it starts no worker. After a scaling, no worker becomes READY."""
    another_handler(good, store / "other.mar")
    without_workers = without_worker_counts(store / "other.mar")
    assert register(trusting, without_workers.name, "later", initial_workers="0").status_code == 200
    trusting.client.scale("later", "1.0", 1, 1)
    wait_for(lambda: worker_failure(trusting.logs, "later"))
    assert trusting.client.workers("later").ready == 0
    assert not (store / "mark").exists()
    trusting.client.unregister("later", "1.0")


def without_worker_counts(archive: Path) -> Path:
    """Write a copy without `minWorkers` and `maxWorkers`, which override the numbers in a registration."""
    lines = mar.read(archive, "model-config.yaml").decode().splitlines()
    kept = "\n".join(line for line in lines if not line.startswith(("minWorkers", "maxWorkers")))
    return mar.rewrite(archive, archive.with_name("no-counts.mar"), {"model-config.yaml": kept.encode()})


def test_register_refused_archive_over_grpc_is_an_internal_error(trusting: Place, good: Path, store: Path):
    another_handler(good, store / "other.mar")
    method = "/org.pytorch.serve.grpc.management.ManagementAPIsService/RegisterModel"
    # RegisterModelRequest: initial_workers = 3, model_name = 5, synchronous = 8, url = 9
    request = b"\x18\x01" + b"\x2a\x07by_grpc" + b"\x40\x01" + b"\x4a\x09other.mar"
    address = f"127.0.0.1:{trusting.ports['grpc_management_port']}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(request, timeout=120)
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    wait_for_failure(trusting, "by_grpc", "'mnist.py' was changed")
    assert not (store / "mark").exists()


def test_register_unsigned_workflow_never_runs_its_functions(trusting: Place, store: Path):
    """TorchServe reads a workflow's archive from the store, and starts workers for the functions in it."""
    manifest = {"createdOn": "today", "archiverVersion": "1"}
    manifest["workflow"] = {"workflowName": "flow", "specFile": "flow.yaml", "handler": "flow.py"}
    spec = "models:\n  min-workers: 1\n  digit:\n    url: mnist.mar\ndag:\n  before: [digit]\n"
    with zipfile.ZipFile(store / "flow.war", "w") as war:
        war.writestr("WAR-INF/MANIFEST.json", json.dumps(manifest))
        war.writestr("flow.yaml", spec)
        war.writestr("flow.py", leaves_a_mark(store / "mark").replace(b"handle", b"before"))
    registered = register(trusting, "flow.war", "flow", api="workflows")
    assert registered.status_code == 500, registered.text

    def is_logged() -> bool:
        lines = (trusting.logs / "model_log.log").read_text().splitlines()
        return any("-flow__before_" in line and "it is not signed" in line for line in lines)

    wait_for(is_logged, LOGGED)
    assert not (store / "mark").exists()


def test_register_archive_with_a_climbing_member_writes_nothing_outside(trusting: Place, good: Path, store: Path):
    """TorchServe itself refuses the archive while it unpacks it."""
    mar.rewrite(good, store / "other.mar", {"../escaped.txt": b""})
    registered = register(trusting, "other.mar")
    assert registered.status_code == 500, registered.text
    temporary = Path(trusting.record()["temporary"])
    assert not list(temporary.rglob("escaped.txt"))
    assert not list(temporary.parent.glob("escaped.txt"))


def test_archive_with_a_link_is_refused(trusting: Place, good: Path, store: Path, tmp_path: Path):
    """TorchServe unpacks a link as a file with the link's target as its text, so it reaches nothing outside."""
    (tmp_path / "outside.py").write_bytes(leaves_a_mark(tmp_path / "mark"))
    link = zipfile.ZipInfo("mnist.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    mar.rewrite(good, store / "other.mar", {link.filename: None})
    with zipfile.ZipFile(store / "other.mar", "a") as new:
        new.writestr(link, str(tmp_path / "outside.py"))
    assert register(trusting, "other.mar", "linked").status_code == 500
    wait_for_failure(trusting, "linked", "'mnist.py' was changed")
    assert not (tmp_path / "mark").exists()
    rolled = trusting.bundle("rollout", "mnist", "--archive", str(store / "other.mar"))
    assert rolled.returncode == 1
    assert "other.mar is refused: 'mnist.py' is a link" in rolled.stderr


def test_worker_started_after_its_folder_changed_is_refused(trusting: Place, tmp_path: Path):
    assert register(trusting, "mnist.mar", "victim").status_code == 200
    pid = trusting.client.describe("victim")["workers"][0]["pid"]
    folder = Path(f"/proc/{pid}/cwd").readlink()
    (folder / "mnist.py").write_bytes(leaves_a_mark(tmp_path / "mark"))
    ready = trusting.client.workers("victim").ready
    trusting.client.scale("victim", "1.0", ready + 1, ready + 1)
    wait_for_failure(trusting, "victim", "'mnist.py' was changed")
    assert not (tmp_path / "mark").exists()
    trusting.client.unregister("victim", "1.0")
