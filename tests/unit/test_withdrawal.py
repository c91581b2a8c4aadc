"""A version that fails is unregistered, unless it is somebody else's. A real HTTP server answers as TorchServe does."""

from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from bundle.errors import BundleError
from bundle.server.client import AlreadyRegistered, Client
from bundle.server.ports import free_ports
from bundle.server.readiness import start_version
from bundle.server.rollout import withdrawn_if_it_fails


def start(client: Client, logs: Path) -> None:
    with withdrawn_if_it_fails(client, "mnist", "1.0"):
        start_version(client, logs, "mnist.mar", "mnist", "1.0", (1, 1), seconds=5)


@pytest.mark.parametrize(
    ("status", "error", "methods"),
    [(409, AlreadyRegistered, ["POST"]), (500, BundleError, ["POST", "GET", "DELETE"])],
)
def test_version_that_somebody_else_registered_is_not_withdrawn(
    httpserver: HTTPServer, tmp_path: Path, status: int, error: type, methods: list[str]
):
    """After any other refusal, the version is withdrawn if it is there."""
    refused = {"code": status, "message": "refused"}
    httpserver.expect_request("/models", method="POST").respond_with_json(refused, status=status)
    httpserver.expect_request("/models/mnist/1.0", method="GET").respond_with_json([{"modelVersion": "1.0"}])
    httpserver.expect_request("/models/mnist/1.0", method="DELETE").respond_with_json({})
    url = httpserver.url_for("").rstrip("/")
    with pytest.raises(BundleError, match=f"TorchServe refused POST /models with {status}") as raised:
        start(Client(url, url), tmp_path)
    assert type(raised.value) is error
    assert [request.method for request, _ in httpserver.log] == methods


def test_failure_that_ends_the_server_is_named():
    """As when the new model needs all the memory: nothing is left to withdraw it from."""
    [port] = free_ports(1)
    nowhere = f"http://127.0.0.1:{port}"
    gone = Client(nowhere, nowhere)
    with pytest.raises(BundleError, match=r"^TorchServe ended\.$"), withdrawn_if_it_fails(gone, "mnist", "1.0"):
        raise BundleError("TorchServe ended.")
