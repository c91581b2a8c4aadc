"""Serving again what management took, against a real HTTP server that answers as TorchServe does."""

import json
import zipfile
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from bundle.catalog import select
from bundle.errors import BundleError
from bundle.mar import MANIFEST
from bundle.server.bring_back import bring_back, workers_of
from bundle.server.client import Client
from bundle.server.process import Server
from bundle.server.settings import Settings

[MNIST] = select(["mnist"])
READY = {"id": "9000", "status": "READY"}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A server whose store has an archive of mnist with three workers."""
    with zipfile.ZipFile(tmp_path / "mnist.mar", "w") as archive:
        model = {"modelName": "mnist", "modelVersion": "1.0", "configFile": "model-config.yaml"}
        archive.writestr(MANIFEST, json.dumps({"model": model}))
        archive.writestr("model-config.yaml", "minWorkers: 3\nmaxWorkers: 4\n")
    return Server(tmp_path / "run", Settings.isolated(tmp_path))


@pytest.fixture
def client(httpserver: HTTPServer) -> Client:
    url = httpserver.url_for("").rstrip("/")
    return Client(url, url)


def described(minimum: int, ready: int) -> list[dict]:
    return [{"modelName": "mnist", "modelVersion": "1.0", "minWorkers": minimum, "workers": [READY] * ready}]


def test_model_with_workers_is_left_as_it_is(httpserver: HTTPServer, client: Client, server: Server):
    """Also with fewer workers than its archive has: somebody scaled it down."""
    httpserver.expect_request("/models/mnist", method="GET").respond_with_json(described(minimum=1, ready=0))
    said: list[str] = []
    assert not bring_back(server, client, MNIST, 5, said.append)
    assert said == []
    assert [request.method for request, _ in httpserver.log] == ["GET"]


def test_model_without_workers_is_scaled_to_those_of_its_archive(
    httpserver: HTTPServer, client: Client, server: Server
):
    httpserver.expect_ordered_request("/models/mnist").respond_with_json(described(minimum=0, ready=0))
    scaled = {"min_worker": "3", "max_worker": "4"}
    httpserver.expect_ordered_request("/models/mnist/1.0", "PUT", query_string=scaled).respond_with_json({})
    httpserver.expect_ordered_request("/models/mnist/1.0").respond_with_json(described(minimum=3, ready=3))
    said: list[str] = []
    assert bring_back(server, client, MNIST, 5, said.append)
    assert said == ["mnist was scaled to 0 workers through the management API. It gets 3 again."]
    httpserver.check_assertions()


def test_model_that_cannot_be_registered_says_how_to_start_anew(httpserver: HTTPServer, client: Client, server: Server):
    """As TorchServe answers without `enable_model_api`."""
    httpserver.expect_request("/models/mnist", method="GET").respond_with_json({}, status=404)
    refused = {"code": 405, "type": "MethodNotAllowedException", "message": "not allowed"}
    httpserver.expect_request("/models", method="POST").respond_with_json(refused, status=405)
    with pytest.raises(
        BundleError, match=r"mnist is not served again: .* 405\. To start .*: make stop, then make serve"
    ):
        bring_back(server, client, MNIST, 5, lambda line: None)


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        ({"minWorkers": 2, "maxWorkers": 3}, (2, 3)),
        ({}, (1, 1)),
        ({"minWorkers": 2}, (1, 1)),
        ({"minWorkers": 3, "maxWorkers": 2}, (1, 1)),
        ({"minWorkers": 0, "maxWorkers": 2}, (1, 1)),
    ],
)
def test_workers_are_those_that_torchserve_starts(config: dict, workers: tuple[int, int]):
    assert workers_of(config, default=1) == workers
