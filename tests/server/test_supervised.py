"""`bundle run`: TorchServe under a supervisor, as in a container."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from bundle.catalog import CONFIG_NAME, select
from bundle.server.client import WorkerCount
from bundle.server.drain import connections
from tests.server.place import Place
from tests.server.supervised import Supervised
from tests.support import altered, models_expecting_four, reversioned, wait_for
from tests.traffic import Traffic

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()
WORKERS = 1


@pytest.fixture
def supervised(place: Place, tmp_path: Path) -> Iterator[Supervised]:
    """A run of MNIST with one worker, because the tests start it often."""
    config = re.sub(r"(minWorkers|maxWorkers): \d+", rf"\1: {WORKERS}", (MNIST.path / CONFIG_NAME).read_text())
    mar = place.store / "mnist.mar"
    altered(mar, tmp_path / "one.mar", {CONFIG_NAME: config.encode()}).replace(mar)
    run = Supervised(place, tmp_path)
    try:
        yield run
    finally:
        run.kill()


@pytest.fixture
def store(place: Place) -> Path:
    return place.store


def test_sigterm_answers_all_accepted_requests(supervised: Supervised):
    """Suspend the workers until SIGTERM, and send more requests than they can hold, so that some are queued."""
    supervised.start()
    assert not (supervised.gate / "closed-127.0.0.1").exists()
    java = supervised.java()
    statuses = []

    def predict() -> None:
        url = f"{supervised.place.client.inference}/predictions/mnist"
        statuses.append(requests.post(url, data=DIGIT, headers={"Connection": "close"}, timeout=60).status_code)

    count = WORKERS * MNIST.config["batchSize"] + 20
    clients = [threading.Thread(target=predict) for _ in range(count)]
    workers = [psutil.Process(worker["pid"]) for worker in supervised.place.client.describe("mnist")["workers"]]
    for worker in workers:
        worker.suspend()
    try:
        for client in clients:
            client.start()
        wait_for(lambda: connections({supervised.place.ports["inference_address"]}) >= count)
        wait_for(lambda: supervised.place.client.describe("mnist")["jobQueueStatus"]["pendingRequests"] >= 20)
        supervised.process.send_signal(signal.SIGTERM)
        wait_for((supervised.gate / "closed-127.0.0.1").exists)
    finally:
        for worker in workers:
            worker.resume()
    assert supervised.process.wait(120) == 0
    for client in clients:
        client.join()
    assert statuses == [200] * count
    assert not java.is_running()
    assert "drained" in supervised.output.read_text()


def test_managed_state_survives_a_restart(supervised: Supervised, store: Path):
    """Restore the numbers of workers, a second name and the default version. An unregistered version stays removed."""
    supervised.start()
    client = supervised.place.client
    reversioned(store / "mnist.mar", "1.5", store / "mnist-again.mar")
    client.scale("mnist", "1.0", WORKERS + 1, WORKERS + 2)
    client.register("mnist-again.mar", "mnist")
    client.set_default("mnist", "1.5")
    client.register("mnist.mar", "digits")
    wait_for(lambda: client.workers("mnist", "1.0").ready == WORKERS + 1 and client.workers("digits").ready == WORKERS)
    wait_for(lambda: supervised.state.read_text().count('"version"') == 3)
    assert supervised.end() == 0

    supervised.start()
    described = {v["modelVersion"]: v for v in client.versions("mnist")}
    assert {version: v["minWorkers"] for version, v in described.items()} == {"1.0": WORKERS + 1, "1.5": WORKERS}
    assert client.describe("mnist")["modelVersion"] == "1.5"
    assert client.predict("digits", DIGIT).status_code == 200
    client.unregister("mnist", "1.0")
    assert supervised.end() == 0  # saves a change that was made just before

    supervised.start()
    assert [v["modelVersion"] for v in client.versions("mnist")] == ["1.5"]


def test_number_of_workers_of_the_command_replaces_that_of_the_archive(supervised: Supervised):
    """What the management API has changed since has precedence, until a start has another number, or none."""
    supervised.start("--workers", f"mnist={WORKERS + 1}")
    client = supervised.place.client
    described = client.describe("mnist")
    assert (described["minWorkers"], described["maxWorkers"]) == (WORKERS + 1, WORKERS + 1)
    assert client.workers("mnist").ready == WORKERS + 1  # the server was not ready before
    client.scale("mnist", "1.0", 1, 1)
    wait_for(lambda: '"minimum": 1' in supervised.state.read_text())
    assert supervised.end() == 0
    supervised.start("--workers", f"mnist={WORKERS + 1}")
    assert client.describe("mnist")["minWorkers"] == 1
    assert supervised.end() == 0
    supervised.start("--workers", f"mnist={WORKERS + 2}")
    assert client.workers("mnist") == WorkerCount(WORKERS + 2, WORKERS + 2)
    assert supervised.end() == 0
    supervised.start()
    assert client.workers("mnist") == WorkerCount(WORKERS, WORKERS)
    assert supervised.end() == 0


def test_version_without_an_archive_is_reported_and_forgotten(supervised: Supervised, store: Path):
    supervised.start()
    reversioned(store / "mnist.mar", "1.5", store / "gone.mar")
    supervised.place.client.register("gone.mar", "mnist")
    wait_for(lambda: '"1.5"' in supervised.state.read_text())
    assert supervised.end() == 0
    (store / "gone.mar").unlink()
    supervised.start()
    assert "not restored: mnist 1.5" in supervised.output.read_text()
    assert [v["modelVersion"] for v in supervised.place.client.versions("mnist")] == ["1.0"]
    wait_for(lambda: '"1.5"' not in supervised.state.read_text())


def test_version_that_fails_to_restore_is_retried_at_the_next_start(supervised: Supervised, store: Path):
    """Its worker fails at one start. On a busy machine, a worker that is not READY in time fails in the same way."""
    supervised.start()
    client = supervised.place.client
    new = reversioned(store / "mnist.mar", "1.5", store / "new.mar")
    client.register("new.mar", "mnist")
    client.set_default("mnist", "1.5")
    wait_for(lambda: '"1.5"' in supervised.state.read_text())
    assert supervised.end() == 0
    good = new.read_bytes()
    reversioned(store / "mnist.mar", "1.5", new, without="index_to_name.json")

    supervised.start()
    assert "not restored: mnist 1.5" in supervised.output.read_text()
    assert client.describe("mnist")["modelVersion"] == "1.0"
    assert client.predict("mnist", DIGIT).status_code == 200
    shown = requests.get(f"http://127.0.0.1:{supervised.port}/ready", timeout=30)
    assert (shown.status_code, shown.json()["not_restored"]) == (200, ["mnist 1.5"])
    assert 'bundle_not_restored{model_name="mnist",model_version="1.5"} 1.0' in supervised.metrics()
    assert supervised.end() == 0

    new.write_bytes(good)
    supervised.start()
    assert client.describe("mnist")["modelVersion"] == "1.5"
    assert 'bundle_not_restored{model_name="mnist",model_version="1.5"} 0.0' in supervised.metrics()


def test_server_that_answers_its_sample_wrongly_never_serves(supervised: Supervised, tmp_path: Path):
    """The run ends, and a proxy that waits for it gets no request through."""
    supervised.place.environment["BUNDLE_MODELS"] = str(models_expecting_four(tmp_path / "models"))
    with pytest.raises(AssertionError):
        supervised.start()
    assert supervised.process.wait(120) == 1
    said = supervised.output.read_text()
    assert "with '3', and its mnist/model-config.yaml expects '4'." in said
    assert "bundle: serving" not in said
    assert (supervised.gate / "closed-127.0.0.1").exists()
    assert supervised.place.processes() == []


def test_dead_torchserve_ends_the_run(supervised: Supervised):
    supervised.start()
    supervised.java().kill()
    assert supervised.process.wait(120) == 1
    assert "TorchServe ended" in supervised.output.read_text()
    assert (supervised.gate / "closed-127.0.0.1").exists()


def test_killed_worker_comes_back_and_is_counted(supervised: Supervised):
    supervised.start()
    os.kill(supervised.worker(), signal.SIGKILL)
    counted = 'bundle_worker_restarts_total{model_name="mnist",model_version="1.0"} 1.0'
    wait_for(lambda: counted in supervised.metrics() and supervised.ready() == 200)
    assert supervised.process.poll() is None


def test_missing_workers_end_the_run(supervised: Supervised):
    """The worker is killed and cannot start again, because the unpacked weights are deleted."""
    supervised.start("--patience", "5")
    [weights] = Path(supervised.place.record()["temporary"]).glob("models/*/model.pt")
    weights.unlink()
    os.kill(supervised.worker(), signal.SIGKILL)
    assert supervised.process.wait(120) == 1
    assert "mnist 1.0 has lacked workers for 5 s" in supervised.output.read_text()


def test_registration_that_never_became_ready_leaves_the_run_ready(supervised: Supervised, store: Path):
    """The other models are unaffected."""
    supervised.start("--patience", "2")
    config = (MNIST.path / CONFIG_NAME).read_text().replace("minWorkers", "# minWorkers").replace("maxW", "# maxW")
    altered(store / "mnist.mar", store / "bad.mar", {"index_to_name.json": None, CONFIG_NAME: config.encode()})
    client = supervised.place.client
    bad = {"url": "bad.mar", "model_name": "bad", "initial_workers": 0}
    assert requests.post(f"{client.management}/models", params=bad, timeout=120).status_code == 200
    client.scale("bad", "1.0", 1, 1)
    wait_for(lambda: 'bundle_workers_ready{model_name="bad"' in supervised.metrics())
    for _ in range(12):  # longer than the patience and the time between two health checks
        assert supervised.ready() == 200
        time.sleep(0.5)
    assert client.workers("bad").ready == 0
    assert supervised.process.poll() is None
    assert '"bad"' not in supervised.state.read_text()


def test_failed_requests_are_counted_by_status(supervised: Supervised):
    """TorchServe's metrics do not name the model of a request that the frontend itself rejected."""
    supervised.start()
    client = supervised.place.client
    client.scale("mnist", "1.0", 0, 0)
    wait_for(lambda: client.predict("mnist", DIGIT).status_code == 503)
    name = 'bundle_failed_requests_total{model_name="mnist",model_version="default",status="503"}'
    wait_for(
        lambda: any(line.startswith(name) and line.split()[1] != "0.0" for line in supervised.metrics().split("\n"))
    )


def test_archives_of_an_image_are_installed_once(supervised: Supervised, store: Path, tmp_path: Path):
    """A restart keeps the version of a rollout. An image with a new archive replaces it."""
    image = tmp_path / "image"
    image.mkdir()
    (store / "mnist.mar").rename(image / "mnist.mar")
    supervised.start("--archives", str(image))
    new = reversioned(image / "mnist.mar", "1.1", tmp_path / "new.mar")
    url = f"{supervised.place.client.inference}/predictions/mnist"
    with Traffic(url, DIGIT, '"top_3_classes": [3', clients=1):
        rolled = supervised.place.bundle("rollout", "mnist", "--archive", str(new))
    assert rolled.returncode == 0, rolled.stderr
    assert supervised.end() == 0
    supervised.start("--archives", str(image))
    assert supervised.place.client.describe("mnist")["modelVersion"] == "1.1"
    assert supervised.end() == 0
    reversioned(image / "mnist.mar", "1.2", tmp_path / "newer.mar").rename(image / "mnist.mar")
    supervised.start("--archives", str(image))
    assert supervised.place.client.describe("mnist")["modelVersion"] == "1.2"
