"""The management API, as TorchServe's users know it, on the bundle's archives."""

import http.server
import threading

import pytest
import requests

from bundle.catalog import select
from bundle.paths import MODEL_STORE
from bundle.samples import first
from tests.support import reversioned, wait_for

SHIPPED = select(["mnist", "image", "audio", "text"])
MNIST = SHIPPED[0]
BATCHING = ("batchSize", "maxBatchDelay")


@pytest.fixture
def management(served) -> str:
    return served.client.management


@pytest.fixture(autouse=True)
def as_found(served, management):
    """Afterwards, mnist is registered once, with the workers that its folder says."""
    yield
    requests.put(f"{management}/models/mnist/1.0/set-default", timeout=60)
    workers = {"min_worker": MNIST.config["minWorkers"], "max_worker": MNIST.config["maxWorkers"]}
    requests.put(f"{management}/models/mnist", params={**workers, "synchronous": "true"}, timeout=60)


def test_scale_and_describe(served, management):
    asked = requests.put(f"{management}/models/mnist", params={"min_worker": 3, "max_worker": 4}, timeout=60)
    assert asked.status_code == 202, asked.text
    wait_for(lambda: served.client.workers("mnist").ready == 3)
    described = served.client.describe("mnist")
    assert (described["minWorkers"], described["maxWorkers"]) == (3, 4)
    assert {key: described[key] for key in BATCHING} == {key: MNIST.config[key] for key in BATCHING}
    asked = requests.put(f"{management}/models/mnist", params={"min_worker": 1, "max_worker": 1}, timeout=60)
    assert asked.status_code == 202, asked.text
    wait_for(lambda: len(served.client.describe("mnist")["workers"]) == 1)


def test_register_list_predict_unregister(served, management):
    """Out of the store, under a name of its own."""
    asked = requests.post(
        f"{management}/models",
        params={"url": "mnist.mar", "model_name": "digits", "synchronous": "true"},
        timeout=120,
    )
    assert asked.status_code == 200, asked.text
    try:
        assert "digits" in served.client.models()
        wait_for(lambda: served.client.workers("digits").ready == MNIST.config["minWorkers"])
        answer = served.client.predict("digits", MNIST.sample_file.read_bytes())
        assert first(answer.json()).label == MNIST.bundle.expect
    finally:
        gone = requests.delete(f"{management}/models/digits", timeout=60)
    assert gone.status_code == 200, gone.text
    assert "digits" not in served.client.models()
    assert served.client.predict("digits", b"x").status_code == 404


def test_versions(served, management, second_version):
    """A second version beside the first: both answer, the default moves, the old one goes."""
    asked = requests.post(f"{management}/models", params={"url": second_version, "synchronous": "true"}, timeout=120)
    assert asked.status_code == 200, asked.text
    listed = requests.get(f"{management}/models/mnist/all", timeout=30).json()
    assert {model["modelVersion"] for model in listed} == {"1.0", "2.0"}
    content = MNIST.sample_file.read_bytes()
    for version in ("1.0", "2.0"):
        url = f"{served.client.inference}/predictions/mnist/{version}"
        assert requests.post(url, data=content, timeout=30).status_code == 200
    assert requests.put(f"{management}/models/mnist/2.0/set-default", timeout=30).status_code == 200
    assert served.client.describe("mnist")["modelVersion"] == "2.0"
    assert requests.put(f"{management}/models/mnist/1.0/set-default", timeout=30).status_code == 200
    assert requests.delete(f"{management}/models/mnist/2.0", timeout=60).status_code == 200


@pytest.fixture
def second_version():
    """The name, in the store, of the MNIST archive as version 2.0."""
    target = reversioned(MODEL_STORE / "mnist.mar", "2.0", MODEL_STORE / "mnist-2.0.mar")
    yield target.name
    target.unlink()


@pytest.mark.parametrize("kind", ["http", "file"])
def test_archives_from_elsewhere_are_refused(management, kind):
    """An archive that would load, were it fetched; nothing is."""
    fetched = []

    class Archives(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((MODEL_STORE / "mnist.mar").read_bytes())

    with http.server.HTTPServer(("127.0.0.1", 0), Archives) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{elsewhere.server_port}/elsewhere.mar"
        url = address if kind == "http" else (MODEL_STORE / "mnist.mar").as_uri()
        asked = requests.post(f"{management}/models", params={"url": url, "model_name": "elsewhere"}, timeout=60)
        elsewhere.shutdown()
    assert asked.status_code == 404, asked.text
    assert "does not match any allowed URL" in asked.text
    assert not fetched


@pytest.mark.parametrize("url", ["../model_store/mnist.mar", "nowhere.mar"])
def test_archives_outside_the_store_are_not_found(management, url):
    asked = requests.post(f"{management}/models", params={"url": url, "model_name": "elsewhere"}, timeout=60)
    assert asked.status_code == 404, asked.text


def test_metrics_of_torchserve_and_of_the_bundle(served):
    for folder in SHIPPED:
        answer = served.client.predict(folder.name, folder.sample_file.read_bytes())
        assert answer.status_code == 200
    assert served.client.predict("mnist", b"no image").status_code == 400

    def scrape() -> str:
        return requests.get(f"{served.url('metrics_address')}/metrics", timeout=30).text

    def complete() -> bool:
        text = scrape()
        own = [
            f'bundle_{metric}_count{{ModelName="{folder.name}",ModelVersion="1.0",'
            for folder in SHIPPED
            for metric in ("batch_size", "decode_seconds", "inference_seconds", "encode_seconds")
        ]
        own += ['bundle_rejected_requests_total{ModelName="mnist",ModelVersion="1.0",ErrorType="UndecodableImage"']
        return all(
            series in text for series in [*own, "ts_inference_requests_total{", "ts_queue_latency_microseconds{"]
        )

    wait_for(complete, 20)
