"""A machine with an unusual set-up: no UTF-8 locale, letters that are not ASCII in the paths, IPv6."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.server.place import Place, mnist_place, serving


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def unusual(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of MNIST whose paths have an umlaut, with the locale C, and gRPC on IPv6 where there is IPv6."""
    place = mnist_place(tmp_path_factory.mktemp("für"), archives)
    place.environment["LC_ALL"] = "C"
    if has_ipv6():
        place.environment.update(TS_GRPC_INFERENCE_ADDRESS="::1", TS_GRPC_MANAGEMENT_ADDRESS="::1")
    with serving(place, "mnist"):
        yield place


@pytest.mark.parametrize("options", [[], ["--grpc"]], ids=["http", "grpc"])
def test_predict_on_an_unusual_machine_answers(unusual: Place, options: list[str]):
    predicted = unusual.bundle("predict", "mnist", *options)
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout)["top_3_classes"][0] == 3


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("mnist", "application/json"),
        ("mnist", "application/x-www-form-urlencoded"),
        ("mnist", "multipart/form-data; boundary=b"),
        ("mnist", "image/png"),
        ("mnist%zz", "image/png"),
        ("unknown", "image/png"),
    ],
)
def test_invalid_request_writes_little_into_the_logs(unusual: Place, path: str, kind: str):
    """A client with invalid requests must not fill the disk."""

    def size() -> int:
        return sum(file.stat().st_size for file in unusual.logs.glob("*.log"))

    before, count = size(), 10
    for _ in range(count):
        url = f"{unusual.client.inference}/predictions/{path}"
        prepared = requests.Request("POST", url, data=b'{"a":', headers={"Content-Type": kind}).prepare()
        prepared.url = url
        with requests.Session() as session:
            assert 400 <= session.send(prepared, timeout=30).status_code < 500
    assert size() - before < 2000 * count
