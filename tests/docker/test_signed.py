"""The stack with TRUSTED_KEY serves only archives that are signed with that key. It also sends traces."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.server.client import check_sample
from bundle.signing import make_keys
from tests.docker.stack import Stack, build_archive, docker, running
from tests.receiver import READY
from tests.support import reversioned, wait_for
from tests.trials.faults.archives import put

[MNIST] = select(["mnist"])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that name a pair of keys, and a store with a signed archive of mnist."""
    folder = tmp_path_factory.mktemp("signed")
    private = folder / "signing.key"
    keys = {"SIGNING_KEY": str(private), "TRUSTED_KEY": str(make_keys(private))}
    build_archive("mnist", folder / "store", **keys)
    return {**keys, "TS_MODEL_STORE": str(folder / "store")}


@pytest.fixture(scope="module")
def signed(keys: dict[str, str]) -> Iterator[Stack]:
    traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317", "TRACE_RATIO": "1"}
    with running(("torchserve", "proxy"), **keys, **traces) as stack:
        yield stack


@pytest.fixture
def collector(signed: Stack) -> Iterator[str]:
    """A container with the tests' receiver of traces, in TorchServe's network."""
    name = f"{signed.project}-collector"
    image = signed.inspect()["Config"]["Image"]
    arguments = ["--name", name, f"--network={signed.project}_back", "--network-alias=collector"]
    arguments += [f"--volume={ROOT / 'tests' / 'receiver.py'}:/receiver.py:ro"]
    docker("run", "--detach", *arguments, "--entrypoint=/opt/bundle/.venv/bin/python", image, "/receiver.py", "4317")
    try:
        wait_for(lambda: READY in docker("logs", name))  # a worker tries to send its spans for 10 s
        yield name
    finally:
        docker("rm", "--force", name)


def test_trace_of_a_request_goes_through_proxy_and_batch(signed: Stack, collector: str):
    content = MNIST.sample_file.read_bytes()
    before = time.time_ns()
    answer = requests.post(f"{signed.url('PORT')}/predictions/mnist", content, timeout=30)
    _, trace, span, sampled = answer.headers["traceresponse"].split("-")
    found: dict[str, dict] = {}

    def complete() -> bool:
        received = [json.loads(line) for line in docker("logs", collector).splitlines() if line != READY]
        found.update({each["name"]: each for each in received if each["trace"] == trace})
        return len(found) == 6

    wait_for(complete, 60)  # the server has looked for a collector before, in vain
    request, queue, batch = found["request"], found["queue"], found["batch"]
    assert (sampled, request["id"], request["parent"]) == ("01", span, "")  # the trace began at the proxy
    assert (queue["parent"], batch["parent"]) == (request["id"], request["id"])
    assert {found[name]["parent"] for name in ("decode", "inference", "encode")} == {batch["id"]}
    assert before - 1e6 <= request["start"] == queue["start"] <= queue["end"] == batch["start"] <= batch["end"]
    assert request["attributes"]["http.response.header.x-request-id"] == [answer.headers["X-Request-Id"]]
    assert f'"trace_id": "{trace}"' in signed.logs("proxy")


def test_signed_archive_is_served(signed: Stack):
    assert signed.client.models() == ["mnist"]
    described = signed.client.describe("mnist")
    assert [worker["status"] for worker in described["workers"]] == ["READY", "READY"]
    assert check_sample(signed.client, MNIST) == MNIST.bundle.expect


def test_registration_and_rollout_of_an_unsigned_archive_are_refused(
    signed: Stack, keys: dict[str, str], tmp_path: Path
):
    unsigned = reversioned(Path(keys["TS_MODEL_STORE"]) / "mnist.mar", "2.0", tmp_path / "unsigned.mar")
    put(signed, unsigned)
    parameters = {"url": "unsigned.mar", "initial_workers": 1, "synchronous": "true"}
    registered = requests.post(f"{signed.url('MANAGEMENT_PORT')}/models", params=parameters, timeout=150)
    assert registered.status_code == 500
    # wait, because TorchServe writes its logs in the background
    wait_for(lambda: "is refused: it is not signed" in signed.execute("cat", "/tmp/run/logs/model_log.log"))
    rolled = signed.roll_out("mnist", unsigned)
    assert rolled.returncode == 1
    assert "it is not signed" in rolled.stdout + rolled.stderr
    assert [version["modelVersion"] for version in signed.client.versions("mnist")] == ["1.0"]


def test_image_with_unsigned_archives_does_not_start(signed: Stack, keys: dict[str, str]):
    command = ["docker", "run", "--rm", "--network", "none", "--env", "TRUSTED_KEY=/run/trusted.pub"]
    command += ["--volume", f"{keys['TRUSTED_KEY']}:/run/trusted.pub:ro", signed.inspect()["Config"]["Image"]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert re.search(r"\w+\.mar is refused: it is not signed", ended.stderr)
    assert "serving" not in ended.stdout
