"""The commands of pods: `bundle fetch` keeps only archives that pass all checks, `bundle check` asks for samples."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import requests
import typer
from pytest_httpserver import HTTPServer
from werkzeug import Response

from bundle.catalog import select
from bundle.cli.app import app
from bundle.cli.parameters import worker_count
from bundle.errors import BundleError, UsageError
from bundle.mar import MANIFEST
from bundle.paths import ROOT
from bundle.server import client
from bundle.server.client import Client, check_sample
from bundle.server.fetch import ABANDONED_SECONDS, Wanted, fetch
from bundle.server.ports import free_ports
from bundle.signing import make_keys, seal
from tests import programs

[MNIST] = select(["mnist"])
THREE = {"top_3_classes": [3, 9, 7], "top_3_probabilities": [0.9, 0.05, 0.01]}


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach the tests' servers without the proxy that the environment may name."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; its public key is beside it."""
    make_keys(tmp_path / "signing.key")
    return tmp_path / "signing.key"


def archive(folder: Path, key: Path | None = None) -> bytes:
    """Return an archive with checksums."""
    file = folder / "made.mar"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(MANIFEST, json.dumps({"model": {"modelName": "mnist", "modelVersion": "1.0"}}))
    seal(file, key)
    return file.read_bytes()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wanted(httpserver: HTTPServer, content: bytes, digest: str = "", path: str = "/mnist.mar") -> Wanted:
    """Serve an archive, and return what to fetch."""
    httpserver.expect_request(path).respond_with_data(content, content_type="application/zip")
    return Wanted("mnist", httpserver.url_for(path), digest or sha256(content))


# --- fetch -----------------------------------------------------------------------------------------------------------


def test_archive_is_fetched_once(httpserver: HTTPServer, tmp_path: Path):
    content = archive(tmp_path)
    this, folder = wanted(httpserver, content), tmp_path / "new" / "archives"
    assert fetch(this, folder, None)
    assert not fetch(this, folder, None)
    assert [file.name for file in folder.iterdir()] == ["mnist.mar"]
    assert (folder / "mnist.mar").read_bytes() == content
    assert len(httpserver.log) == 1


def test_archive_with_another_checksum_is_not_kept(httpserver: HTTPServer, tmp_path: Path):
    """What was there before stays."""
    content, folder = archive(tmp_path), tmp_path / "archives"
    folder.mkdir()
    (folder / "mnist.mar").write_bytes(b"old")
    with pytest.raises(BundleError, match=f"has the SHA-256 {sha256(content)}, and not {'0' * 64}"):
        fetch(wanted(httpserver, content, "0" * 64), folder, None)
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("mnist.mar", b"old")]


def test_file_that_is_no_archive_is_not_kept(httpserver: HTTPServer, tmp_path: Path):
    with pytest.raises(BundleError, match=r"^mnist\.mar is refused: it cannot be read"):
        fetch(wanted(httpserver, b"<html>"), tmp_path / "archives", None)
    assert list((tmp_path / "archives").iterdir()) == []


def test_archive_must_be_signed_with_the_trusted_key(httpserver: HTTPServer, tmp_path: Path, key: Path):
    folder, trusted = tmp_path / "archives", key.with_name("signing.key.pub")
    other = tmp_path / "other.key"
    make_keys(other)
    unsigned = wanted(httpserver, archive(tmp_path))
    with pytest.raises(BundleError, match=r"^mnist\.mar is refused: it is not signed"):
        fetch(unsigned, folder, trusted)
    with pytest.raises(BundleError, match="was not made with the key of"):
        fetch(wanted(httpserver, archive(tmp_path, other), path="/other.mar"), folder, trusted)
    assert list(folder.iterdir()) == []
    assert fetch(wanted(httpserver, archive(tmp_path, key), path="/signed.mar"), folder, trusted)


def test_archive_that_is_there_is_checked_again(httpserver: HTTPServer, tmp_path: Path, key: Path):
    """A pod may start again with another trusted key."""
    this = wanted(httpserver, archive(tmp_path))
    fetch(this, tmp_path / "archives", None)
    with pytest.raises(BundleError, match="it is not signed"):
        fetch(this, tmp_path / "archives", key.with_name("signing.key.pub"))


def test_error_of_the_server_is_named_without_secrets(httpserver: HTTPServer, tmp_path: Path):
    httpserver.expect_request("/mnist.mar").respond_with_data("denied", status=403)
    url = httpserver.url_for("/mnist.mar").replace("://", "://user:password@") + "?X-Amz-Signature=secret"
    with pytest.raises(BundleError) as refused:
        fetch(Wanted("mnist", url, "0" * 64), tmp_path, None)
    assert str(refused.value) == f"{httpserver.url_for('/mnist.mar')} answered 403 FORBIDDEN."


def test_password_comes_from_the_netrc_file(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    this = wanted(httpserver, archive(tmp_path))
    (tmp_path / "netrc").write_text(f"machine {httpserver.host} login reader password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetch(this, tmp_path / "archives", None)
    [(request, _)] = httpserver.log
    assert (request.authorization.username, request.authorization.password) == ("reader", "secret")


def test_server_that_does_not_answer_is_named_without_secrets(tmp_path: Path):
    [port] = free_ports(1)
    with pytest.raises(BundleError) as refused:
        fetch(Wanted("mnist", f"http://127.0.0.1:{port}/mnist.mar?token=secret", "0" * 64), tmp_path, None)
    assert f"http://127.0.0.1:{port}/mnist.mar cannot be downloaded: " in str(refused.value)
    assert "Connection refused" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_answer_that_ends_early_is_not_kept(httpserver: HTTPServer, tmp_path: Path):
    content = archive(tmp_path)

    def cut(_: object) -> Response:
        answer = Response(content[:-10])
        answer.headers["Content-Length"] = str(len(content))
        answer.automatically_set_content_length = False
        return answer

    httpserver.expect_request("/mnist.mar").respond_with_handler(cut)
    with pytest.raises(BundleError, match=r"cannot be downloaded|has the SHA-256"):
        fetch(Wanted("mnist", httpserver.url_for("/mnist.mar"), sha256(content)), tmp_path / "archives", None)
    assert list((tmp_path / "archives").iterdir()) == []


@pytest.mark.slow
def test_full_disk_is_named(httpserver: HTTPServer, tmp_path: Path):
    """A limit on the size of files stops the write as a full disk does: with an OSError."""
    content = archive(tmp_path) + bytes(2**16)
    this = wanted(httpserver, content)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from bundle.cli.app import app, console; console.run(app, 'bundle', sys.argv[1:])"
    )
    arguments = ["fetch", f"mnist={this.url}#sha256={this.digest}", "--into", str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'new' / 'mnist.mar'} cannot be written: File too large.\n"


def test_archive_of_another_program_is_checked(tmp_path: Path, key: Path):
    content, folder = archive(tmp_path), tmp_path / "archives"
    this = Wanted.parse(f"mnist#sha256={sha256(content)}")
    with pytest.raises(BundleError, match=rf"mnist\.mar is missing\. The archive with the SHA-256 {this.digest}"):
        fetch(this, folder, None)
    (folder / "mnist.mar").write_bytes(content)
    assert not fetch(this, folder, None)
    with pytest.raises(BundleError, match="it is not signed"):
        fetch(this, folder, key.with_name("signing.key.pub"))
    (folder / "mnist.mar").write_bytes(b"other")
    with pytest.raises(BundleError, match=f"has the SHA-256 {sha256(b'other')}"):
        fetch(this, folder, None)


@pytest.mark.parametrize(
    "text",
    [
        "mnist",
        "mnist#sha256=",
        f"mnist=#sha256={'0' * 64}",
        "mnist=https://models.example/mnist.mar",
        f"https://models.example/mnist.mar#sha256={'0' * 64}",
        f"mnist=file:///mnist.mar#sha256={'0' * 64}",
        f"../mnist=https://models.example/mnist.mar#sha256={'0' * 64}",
        f"mnist=https://models.example/mnist.mar#sha256={'0' * 63}",
    ],
)
def test_other_texts_are_usage_errors(text: str):
    with pytest.raises(UsageError, match="MODEL=URL#sha256=DIGEST"):
        Wanted.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "mnist=https://user:secret@models.example/mnist.mar",
        f"https://user:secret@models.example/mnist.mar#sha256={'0' * 64}",
        f"mnist=ftp://models.example/mnist.mar?signature=secret#sha256={'0' * 64}",
        f"mnist=http://user:secret@[::1/mnist.mar#sha256={'0' * 64}",
        f"mnist=http://user:secret@/mnist.mar#sha256={'0' * 64}",
        f"mnist=http://user:secret@models.example:99999/mnist.mar#sha256={'0' * 64}",
    ],
)
def test_usage_errors_name_the_archive_without_secrets(text: str):
    with pytest.raises(
        UsageError, match=r"^Archive '(mnist|https)' must be given as MODEL=URL#sha256=DIGEST"
    ) as refused:
        Wanted.parse(text)
    assert "secret" not in str(refused.value)


def test_invalid_ca_file_is_named_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CA_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(BundleError, match=r"cannot be downloaded: CA_FILE is .*: No such file or directory\.$"):
        fetch(Wanted("mnist", "https://models.example/mnist.mar", "0" * 64), tmp_path, None)


def test_what_a_killed_download_left_is_removed(httpserver: HTTPServer, tmp_path: Path):
    """That of a download that runs stays."""
    this, folder = wanted(httpserver, archive(tmp_path)), tmp_path / "archives"
    for name, age in (("killed", ABANDONED_SECONDS + 60), ("runs", 60)):
        partial = folder / f".fetch-{name}" / "mnist.mar"
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"half")
        os.utime(partial, (time.time() - age,) * 2)
    assert fetch(this, folder, None)
    assert sorted(file.name for file in folder.iterdir()) == [".fetch-runs", "mnist.mar"]


def test_command_fetches_several(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRUSTED_KEY", raising=False)
    this = wanted(httpserver, archive(tmp_path))
    texts = [f"{name}={this.url}#sha256={this.digest.upper()}" for name in ("mnist", "digits")]
    ended = programs.run(app, "fetch", *texts, "--into", str(tmp_path / "archives"))
    assert (ended.status, ended.stderr) == (0, "")
    assert ended.stdout == "mnist.mar: downloaded, checked\ndigits.mar: downloaded, checked\n"
    assert sorted(file.name for file in (tmp_path / "archives").iterdir()) == ["digits.mar", "mnist.mar"]


# --- check -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.05)


def test_check_accepts_the_expected_answer(httpserver: HTTPServer):
    httpserver.expect_request("/predictions/mnist", "POST", data=MNIST.sample_file.read_bytes()).respond_with_json(
        THREE
    )
    ended = programs.run(app, "check", f"{httpserver.url_for('')}", "mnist")
    assert ended == programs.Ended(0, "mnist: sample.png is answered with '3'\n", "")


def test_check_sends_the_key_of_the_environment(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHSERVE_KEY", "secret")
    authorized = {"Authorization": "Bearer secret"}
    httpserver.expect_request("/predictions/mnist", "POST", headers=authorized).respond_with_json(THREE)
    assert programs.run(app, "check", httpserver.url_for(""), "mnist").status == 0
    monkeypatch.delenv("TORCHSERVE_KEY")
    assert programs.run(app, "check", httpserver.url_for(""), "mnist").status == 1


def test_check_fails_at_once_for_a_wrong_answer(httpserver: HTTPServer):
    httpserver.expect_request("/predictions/mnist").respond_with_json(THREE | {"top_3_classes": [8, 9, 7]})
    ended = programs.run(app, "check", httpserver.url_for(""), "mnist", "--patience", "1m")
    assert (ended.status, ended.stdout, len(httpserver.log)) == (1, "", 1)
    assert (
        "mnist answered its own sample sample.png with '8', and its mnist/model-config.yaml expects '3'" in ended.stderr
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status", client.PASSING)
def test_check_repeats_what_may_pass(httpserver: HTTPServer, status: int):
    httpserver.expect_ordered_request("/predictions/mnist").respond_with_data("", status=status)
    httpserver.expect_ordered_request("/predictions/mnist").respond_with_json(THREE)
    assert programs.run(app, "check", httpserver.url_for(""), "mnist").status == 0


@pytest.mark.usefixtures("quick")
def test_check_ends_with_the_last_answer(httpserver: HTTPServer):
    httpserver.expect_request("/predictions/mnist").respond_with_json({"message": "no workers"}, status=503)
    ended = programs.run(app, "check", httpserver.url_for(""), "mnist", "--patience", "200ms")
    assert ended.status == 1
    assert "mnist answered its own sample sample.png with 503." in ended.stderr
    assert len(httpserver.log) > 1


@pytest.mark.usefixtures("quick")
def test_check_names_the_server_that_does_not_answer():
    [port] = free_ports(1)
    ended = programs.run(app, "check", f"http://127.0.0.1:{port}", "mnist", "--patience", "200ms")
    assert (ended.status, ended.stdout) == (1, "")
    assert f"mnist: no answer from http://127.0.0.1:{port}: " in ended.stderr


def test_other_callers_do_not_repeat(httpserver: HTTPServer):
    httpserver.expect_request("/predictions/mnist").respond_with_data("", status=503)
    url = httpserver.url_for("").rstrip("/")
    with pytest.raises(BundleError, match="503"):
        check_sample(Client(url, url), MNIST)
    assert len(httpserver.log) == 1
    [port] = free_ports(1)
    with pytest.raises(requests.ConnectionError):
        check_sample(Client(f"http://127.0.0.1:{port}", url), MNIST)


# --- run --workers ---------------------------------------------------------------------------------------------------


def test_number_of_workers_is_parsed():
    assert worker_count("mnist=12") == ("mnist", 12)


@pytest.mark.parametrize("text", ["mnist", "mnist=", "=2", "mnist=0", "mnist=-1", "mnist=two", "mnist=1.5"])
def test_invalid_number_of_workers_is_refused(text: str):
    with pytest.raises(typer.BadParameter, match="is not a model and its number of workers"):
        worker_count(text)


def test_workers_of_a_model_that_is_not_served_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mnist.mar").write_bytes(archive(tmp_path))
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path))
    monkeypatch.setenv("BUNDLE_WORKERS", "mnist=2 text=1")
    ended = programs.run(app, "run", "mnist")
    assert (ended.status, ended.stderr) == (2, "error: --workers names text, which is not served here.\n")
