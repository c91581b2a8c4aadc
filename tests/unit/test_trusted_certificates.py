"""Clients of servers over TLS: what they trust, and what they say of a certificate that they do not trust."""

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from bundle.errors import BundleError
from bundle.load.generator import closed_loop
from bundle.paths import ROOT
from bundle.server.client import Client, curl_lines
from bundle.server.http import session
from tests.certificates import Authority

DIGIT = {"top_3_classes": [3, 9, 7], "top_3_probabilities": [0.9, 0.06, 0.04]}  # as the model mnist answers


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


def https_server(authority: Authority, **names: str) -> Iterator[HTTPServer]:
    certificate, key = authority.issue(**names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(host="127.0.0.1", ssl_context=context) as server:
        server.expect_request("/predictions/mnist").respond_with_json(DIGIT)
        server.expect_request("/models/mnist").respond_with_json([])
        yield server


@pytest.fixture
def server(authority: Authority) -> Iterator[HTTPServer]:
    yield from https_server(authority, name="IP:127.0.0.1")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CA_FILE", raising=False)


def client(server: HTTPServer) -> Client:
    url = server.url_for("").rstrip("/")
    return Client(url, url)


def test_certificate_of_a_private_authority_is_named_as_the_cause(server: HTTPServer):
    for call in (lambda: client(server).predict("mnist", b"x"), lambda: client(server).describe("mnist")):
        with pytest.raises(BundleError) as failure:
            call()
        assert str(failure.value) == (
            f"The certificate of https://127.0.0.1:{server.port} is not trusted: unable to get local issuer "
            "certificate. Set CA_FILE to a PEM file with the certificate of its authority."
        )


def test_server_is_trusted_with_the_certificate_of_its_authority(
    server: HTTPServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CA_FILE", str(authority.file))
    assert client(server).predict("mnist", b"x").status_code == 200
    assert client(server).describe("mnist") is None
    assert curl_lines(client(server), [])[-1] == f"curl --cacert {authority.file} {client(server).management}/models"


def test_certificate_of_another_host_is_named_as_the_cause(authority: Authority, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CA_FILE", str(authority.file))
    for server in https_server(authority, name="DNS:elsewhere.example"):
        with pytest.raises(
            BundleError, match="certificate is not valid for '127.0.0.1'. Use a host name that it names."
        ):
            client(server).predict("mnist", b"x")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_file_without_certificates_is_rejected(
    server: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
):
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    monkeypatch.setenv("CA_FILE", str(file))
    with pytest.raises(BundleError, match=f"CA_FILE is '{file}', and must be a PEM file of certificates: "):
        client(server).predict("mnist", b"x")


def test_plain_http_on_a_port_that_is_asked_for_tls_is_named(httpserver: HTTPServer):
    with pytest.raises(BundleError, match=f"https://127.0.0.1:{httpserver.port} does not answer with TLS: "):
        session.get(f"https://127.0.0.1:{httpserver.port}/models", timeout=10)


@pytest.mark.slow
def test_wrk_sends_nothing_to_a_server_that_is_not_trusted(server: HTTPServer, authority: Authority, monkeypatch):
    def load() -> int:
        return closed_loop(server.url_for("/predictions/mnist"), b"x", {}, concurrency=1, seconds=0.5).answered

    with pytest.raises(BundleError, match="is not trusted"):
        load()
    assert server.log == []
    monkeypatch.setenv("CA_FILE", str(authority.file))
    assert load() > 0


# -- the load test ----------------------------------------------------------------------------------------------------

LOADTEST = ("-m", "loadtest", "run", "mnist", "--users", "1", "--duration", "2s")


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "COLUMNS": "160", **variables},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_load_test_names_the_certificate_that_is_not_trusted(server: HTTPServer):
    run = run_python(*LOADTEST, "--host", client(server).inference)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1), run.stderr
    assert "is not trusted" in run.stderr


@pytest.mark.slow
def test_load_test_trusts_the_authority(server: HTTPServer, authority: Authority, tmp_path: Path):
    options = ("--host", client(server).inference, "--results", str(tmp_path / "run"))
    run = run_python(*LOADTEST, *options, CA_FILE=str(authority.file))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_locust_itself_sends_nothing_to_a_server_that_is_not_trusted(server: HTTPServer, authority: Authority):
    locust = ("-m", "locust", "--locustfile", "loadtest/locustfile.py", "--headless", "-u", "1", "-t", "2s")
    run = run_python(*locust, "--host", client(server).inference, MODELS="mnist")
    assert run.returncode == 1, run.stderr
    assert "no answer: SSLCertVerificationError" in run.stdout + run.stderr
    assert server.log == []
