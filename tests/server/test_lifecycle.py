"""TorchServe's management and metrics APIs with the bundle's archives."""

from collections.abc import Iterator

import pytest
import requests

from bundle.catalog import select
from bundle.samples import first
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import reversioned, wait_for

FOLDERS = select(list(SHIPPED))
[MNIST] = select(["mnist"])
BATCHING = ("batchSize", "maxBatchDelay")


@pytest.fixture
def management(served) -> str:
    return served.client.management


@pytest.fixture(autouse=True)
def restored(served, management):
    """After each test, restore the default version and the numbers of workers of mnist."""
    yield
    requests.put(f"{management}/models/mnist/1.0/set-default", timeout=60)
    workers = {"min_worker": MNIST.config["minWorkers"], "max_worker": MNIST.config["maxWorkers"]}
    requests.put(f"{management}/models/mnist", params={**workers, "synchronous": "true"}, timeout=60)


def test_scaling_changes_the_number_of_workers(served, management):
    scaled = requests.put(f"{management}/models/mnist", params={"min_worker": 3, "max_worker": 4}, timeout=60)
    assert scaled.status_code == 202, scaled.text
    wait_for(lambda: served.client.workers("mnist").ready == 3)
    described = served.client.describe("mnist")
    assert (described["minWorkers"], described["maxWorkers"]) == (3, 4)
    assert {key: described[key] for key in BATCHING} == {key: MNIST.config[key] for key in BATCHING}
    scaled = requests.put(f"{management}/models/mnist", params={"min_worker": 1, "max_worker": 1}, timeout=60)
    assert scaled.status_code == 202, scaled.text
    wait_for(lambda: len(served.client.describe("mnist")["workers"]) == 1)


def test_archive_registered_under_another_name_is_served_until_unregistered(served, management):
    registered = requests.post(
        f"{management}/models",
        params={"url": "mnist.mar", "model_name": "digits", "synchronous": "true"},
        timeout=120,
    )
    assert registered.status_code == 200, registered.text
    try:
        assert "digits" in served.client.models()
        wait_for(lambda: served.client.workers("digits").ready == MNIST.config["minWorkers"])
        answer = served.client.predict("digits", MNIST.sample_file.read_bytes())
        assert first(answer.json()).label == MNIST.bundle.expect
    finally:
        deleted = requests.delete(f"{management}/models/digits", timeout=60)
    assert deleted.status_code == 200, deleted.text
    assert "digits" not in served.client.models()
    assert served.client.predict("digits", b"x").status_code == 404


def test_registration_sets_the_batch_and_leaves_workers_and_timeouts_to_the_archive(served, management):
    """As docs/operations.md says. TorchServe ignores the other parameters silently."""
    numbers = {"batch_size": 3, "max_batch_delay": 77, "response_timeout": 5, "startup_timeout": 55}
    query = {"url": "mnist.mar", "model_name": "digits", "synchronous": "true", "initial_workers": 1, **numbers}
    registered = requests.post(f"{management}/models", params=query, timeout=120)
    try:
        assert registered.status_code == 200, registered.text
        described = served.client.describe("digits")
        assert [described[key] for key in BATCHING] == [3, 77]
        settings = ("minWorkers", "maxWorkers", "responseTimeout", "startupTimeout")
        assert {key: described[key] for key in settings} == {key: MNIST.config[key] for key in settings}
        one = {"min_worker": 1, "max_worker": 1, "synchronous": "true"}
        assert requests.put(f"{management}/models/digits", params=one, timeout=60).status_code == 200
        assert len(served.client.describe("digits")["workers"]) == 1
    finally:
        requests.delete(f"{management}/models/digits", timeout=60)


def test_second_version_is_served_beside_the_first_and_can_be_the_default(served, management, second_version):
    parameters = {"url": second_version, "synchronous": "true"}
    registered = requests.post(f"{management}/models", params=parameters, timeout=120)
    assert registered.status_code == 200, registered.text
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
def second_version(served: Place) -> Iterator[str]:
    """The name of an archive in the store: MNIST as version 2.0."""
    target = reversioned(served.store / "mnist.mar", "2.0", served.store / "mnist-2.0.mar")
    yield target.name
    target.unlink()


def test_metrics_after_predictions_have_series_of_torchserve_and_of_the_bundle(served):
    for folder in FOLDERS:
        answer = served.client.predict(folder.name, folder.sample_file.read_bytes())
        assert answer.status_code == 200
    assert served.client.predict("mnist", b"no image").status_code == 400

    def scrape() -> str:
        return requests.get(f"{served.url('metrics_address')}/metrics", timeout=30).text

    def complete() -> bool:
        text = scrape()
        own = [
            f'bundle_{metric}_count{{ModelName="{folder.name}",ModelVersion="1.0",'
            for folder in FOLDERS
            for metric in ("batch_size", "decode_seconds", "inference_seconds", "encode_seconds")
        ]
        own += ['bundle_rejected_requests_total{ModelName="mnist",ModelVersion="1.0",ErrorType="UndecodableImage"']
        return all(
            series in text for series in [*own, "ts_inference_requests_total{", "ts_queue_latency_microseconds{"]
        )

    wait_for(complete)
