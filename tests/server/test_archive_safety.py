"""What is not in the store, not what was built, or not signed by whom it should, never runs: not at a start, not at a
rollout, and not by registration, over which the bundle has no say but through the workers.

TorchServe unpacks what it is given before a worker starts, and answers a registration when its workers are up or have
failed. So a refusal by the workers' guard is an answer of 500, or no READY worker where nobody waits; either way none
of the archive's code runs, and the log says why.
"""

import http.server
import json
import shutil
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
from tests.altered import REFUSED, another_handler, every_refusal, leaves_a_mark
from tests.server.conftest import Place
from tests.support import wait_for

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
LOGGED = 20  # seconds: TorchServe writes its logs in the background


@pytest.fixture
def store(good: Path) -> Path:
    return good.parent


def logs_of(place: Place) -> Path:
    return Path(place.environment["RUN_DIR"]) / "logs"


def register(place: Place, url: str, name: str = "elsewhere", api: str = "models", **options: str) -> requests.Response:
    named = {"url": url, "model_name" if api == "models" else "workflow_name": name, "synchronous": "true"}
    return requests.post(f"{place.client.management}/{api}", params=named | options, timeout=300)


# --- where archives come from --------------------------------------------------------------------------------------


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Sends whoever asks for /redirect to the archive, and counts who came."""

    asked: list[str] = []
    archive: Path

    def do_GET(self) -> None:
        self.asked.append(self.path)
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
def test_archives_come_from_the_store_alone(trusting, good, elsewhere, tmp_path, url: str, api: str):
    """TorchServe refuses each itself (404), and asks nobody for it."""
    kind = {"models": "mar", "workflows": "war"}[api]
    outside = good.parents[1] / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(good, outside / f"other.{kind}")
    Elsewhere.asked.clear()
    asked = register(trusting, url.format(elsewhere=elsewhere, outside=outside, kind=kind), api=api)
    assert asked.status_code == 404, asked.text
    assert not Elsewhere.asked
    assert list(good.parent.glob("other*")) == []


def fails_with(place: Place, model: str, text: str) -> None:
    """Waits until the log says that a worker of the model does."""
    wait_for(lambda: text in str(worker_failure(logs_of(place), model)), LOGGED)


@pytest.mark.parametrize("where", ["outside", "in the store"])
def test_a_folder_never_runs(trusting: Place, good: Path, store: Path, tmp_path: Path, where: str):
    """TorchServe takes any folder of the machine by its absolute path, and one in the store by its name, without a look
    at `allowed_urls`; no worker starts in it, not even if it is what was signed."""
    folder = mar.unpack(good, tmp_path / "other" if where == "outside" else store / "other")
    asked = register(trusting, str(folder) if where == "outside" else "other")
    assert asked.status_code == 500, asked.text
    fails_with(trusting, "elsewhere", f"{folder} is refused: it was not unpacked from an archive of the model store")


def test_a_folder_brings_no_python_of_its_own(trusting: Place, good: Path, tmp_path: Path):
    """With `useVenv`, TorchServe starts workers with venv/bin/python beside the model's folder; here that is the
    folder's own, because of its name. It first has a venv made by the Python that it knows, the guard, and answers 400.
    It keeps the name registered, without a worker."""
    folder = mar.unpack(good, tmp_path / "venv")
    config = folder / "model-config.yaml"
    config.write_text(f"useVenv: true\n{config.read_text()}")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\ntouch {tmp_path / 'mark'}\n")
    (folder / "bin" / "python").chmod(0o755)
    asked = register(trusting, str(folder))
    assert asked.status_code == 400, asked.text
    assert trusting.client.workers("elsewhere").ready == 0
    trusting.client.unregister("elsewhere", "1.0")
    wait_for(lambda: "Packages are not installed for a model" in (logs_of(trusting) / "ts_log.log").read_text(), LOGGED)
    assert not (tmp_path / "mark").exists()


def test_a_registration_names_no_handler_elsewhere(trusting: Place, tmp_path: Path):
    """TorchServe puts the folder of a handler that a registration names at the head of the worker's PYTHONPATH."""
    for name in ("other.py", "sitecustomize.py"):
        (tmp_path / name).write_bytes(leaves_a_mark(tmp_path / "mark"))
    asked = register(trusting, "mnist.mar", handler=f"{tmp_path}/other.py:handle")
    assert asked.status_code == 500, asked.text
    assert not (tmp_path / "mark").exists()


# --- what is in them -----------------------------------------------------------------------------------------------


def test_what_was_signed_is_served(trusting: Place, good: Path):
    """And registered again, over HTTP, whatever Python is asked for; nothing is left in the workers' folders that would
    be refused at their next start."""
    for runtime in ("python", "python3"):
        assert register(trusting, "mnist.mar", runtime=runtime).status_code == 200
        trusting.client.scale("elsewhere", "1.0", 3, 3)
        wait_for(lambda: trusting.client.workers("elsewhere").ready == 3)
        assert first(trusting.client.predict("elsewhere", DIGIT).json()).label == MNIST.bundle.expect
        trusting.client.unregister("elsewhere", "1.0")


@every_refusal
def test_a_registration_is_refused(trusting: Place, good: Path, store: Path, wrong: Callable[[Path, Path], Path]):
    """TorchServe unpacks the archive and answers 500, because its worker does not start."""
    wrong(good, store / "other.mar")
    for options in ({}, {"runtime": "python3"}):
        asked = register(trusting, "other.mar", wrong.__name__, **options)
        assert asked.status_code == 500, asked.text
    started = f"A worker of {wrong.__name__} failed: BundleError: The unpacked archive is refused: "
    fails_with(trusting, wrong.__name__, started)
    assert REFUSED[wrong] in str(worker_failure(logs_of(trusting), wrong.__name__))
    assert not (store / "mark").exists()


def test_a_registration_that_nobody_waits_for_is_refused(trusting: Place, good: Path, store: Path):
    """TorchServe answers 200 where no worker is asked for at first; later none becomes READY."""
    another_handler(good, store / "other.mar")
    without_workers = reversioned_config(store / "other.mar")
    assert register(trusting, without_workers.name, "later", initial_workers="0").status_code == 200
    trusting.client.scale("later", "1.0", 1, 1)
    wait_for(lambda: worker_failure(logs_of(trusting), "later"))
    assert trusting.client.workers("later").ready == 0
    assert not (store / "mark").exists()
    trusting.client.unregister("later", "1.0")


def reversioned_config(archive: Path) -> Path:
    """The same without `minWorkers`, which would stand above what a registration says."""
    lines = mar.read(archive, "model-config.yaml").decode().splitlines()
    kept = "\n".join(line for line in lines if not line.startswith(("minWorkers", "maxWorkers")))
    return mar.rewrite(archive, archive.with_name("patient.mar"), {"model-config.yaml": kept.encode()})


def test_a_registration_over_grpc_is_refused(trusting: Place, good: Path, store: Path):
    another_handler(good, store / "other.mar")
    method = "/org.pytorch.serve.grpc.management.ManagementAPIsService/RegisterModel"
    # RegisterModelRequest: initial_workers = 3, model_name = 5, synchronous = 8, url = 9
    request = b"\x18\x01" + b"\x2a\x07by_grpc" + b"\x40\x01" + b"\x4a\x09other.mar"
    address = f"127.0.0.1:{trusting.ports['grpc_management_port']}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(request, timeout=120)
    assert refused.value.code() == grpc.StatusCode.INTERNAL
    fails_with(trusting, "by_grpc", "'mnist.py' was changed")
    assert not (store / "mark").exists()


def test_a_workflow_runs_no_functions_that_nobody_signed(trusting: Place, store: Path):
    """TorchServe takes a workflow's archive out of the store by name, and starts workers for the functions in it."""
    manifest = {"createdOn": "today", "archiverVersion": "1"}
    manifest["workflow"] = {"workflowName": "flow", "specFile": "flow.yaml", "handler": "flow.py"}
    spec = "models:\n  min-workers: 1\n  digit:\n    url: mnist.mar\ndag:\n  before: [digit]\n"
    with zipfile.ZipFile(store / "flow.war", "w") as war:
        war.writestr("WAR-INF/MANIFEST.json", json.dumps(manifest))
        war.writestr("flow.yaml", spec)
        war.writestr("flow.py", leaves_a_mark(store / "mark").replace(b"handle", b"before"))
    asked = register(trusting, "flow.war", "flow", api="workflows")
    assert asked.status_code == 500, asked.text

    def said() -> bool:
        lines = (logs_of(trusting) / "model_log.log").read_text().splitlines()
        return any("-flow__before_" in line and "it is not signed" in line for line in lines)

    wait_for(said, LOGGED)
    assert not (store / "mark").exists()


def test_a_member_that_leads_out_of_its_folder(trusting: Place, good: Path, store: Path):
    """TorchServe itself refuses the archive while it unpacks it (500): nothing is written outside."""
    mar.rewrite(good, store / "other.mar", {"../escaped.txt": b""})
    asked = register(trusting, "other.mar")
    assert asked.status_code == 500, asked.text
    temporary = Path(json.loads((Path(trusting.environment["RUN_DIR"]) / "server.json").read_text())["temporary"])
    assert not list(temporary.rglob("escaped.txt"))
    assert not list(temporary.parent.glob("escaped.txt"))


def test_a_member_that_is_a_link(trusting: Place, good: Path, store: Path, key: Path, tmp_path: Path):
    """TorchServe unpacks it as a file that holds the link's target: nothing outside is reached. No bundle signs it."""
    (tmp_path / "outside.py").write_bytes(leaves_a_mark(tmp_path / "mark"))
    link = zipfile.ZipInfo("mnist.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    mar.rewrite(good, store / "other.mar", {link.filename: None})
    with zipfile.ZipFile(store / "other.mar", "a") as new:
        new.writestr(link, str(tmp_path / "outside.py"))
    assert register(trusting, "other.mar", "linked").status_code == 500
    fails_with(trusting, "linked", "'mnist.py' was changed")
    assert not (tmp_path / "mark").exists()
    rolled = trusting.bundle("rollout", "mnist", "--archive", str(store / "other.mar"))
    assert rolled.returncode == 1
    assert "other.mar is refused: 'mnist.py' is a link" in rolled.stderr


def test_what_changes_after_it_was_unpacked_is_refused(trusting: Place, tmp_path: Path):
    """A worker that starts later looks again."""
    assert register(trusting, "mnist.mar", "victim").status_code == 200
    pid = trusting.client.describe("victim")["workers"][0]["pid"]
    folder = Path(f"/proc/{pid}/cwd").readlink()
    (folder / "mnist.py").write_bytes(leaves_a_mark(tmp_path / "mark"))
    ready = trusting.client.workers("victim").ready
    trusting.client.scale("victim", "1.0", ready + 1, ready + 1)
    fails_with(trusting, "victim", "'mnist.py' was changed")
    assert not (tmp_path / "mark").exists()
    trusting.client.unregister("victim", "1.0")
