"""`make serve` beside a server that runs: it adds models, brings back what management took, and stops nothing for what
fails."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from bundle.catalog import CONFIG_NAME, select
from bundle.paths import MODELS
from bundle.samples import first
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import wait_for
from tests.traffic import Traffic

[MNIST] = select(["mnist"])
WORKERS = MNIST.config["minWorkers"]


def answers(served: Place) -> bool:
    answer = served.client.predict("mnist", MNIST.sample_file.read_bytes())
    return answer.status_code == 200 and first(answer.json()).label == MNIST.bundle.expect


@pytest.fixture
def restored(served: Place) -> Iterator[None]:
    """After the test, mnist is served with its own number of workers, whatever the test came to."""
    yield
    if served.client.describe("mnist") is None:
        served.client.register("mnist.mar", "mnist")
    served.client.scale("mnist", "1.0", WORKERS, WORKERS)
    wait_for(lambda: served.client.workers("mnist").ready == WORKERS)


def unregister(served: Place) -> None:
    served.client.unregister("mnist", "1.0")


def scale_to_zero(served: Place) -> None:
    query = {"min_worker": 0, "max_worker": 0, "synchronous": "true"}
    requests.put(f"{served.client.management}/models/mnist", params=query, timeout=60).raise_for_status()


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (unregister, "mnist was unregistered through the management API. It is registered again."),
        (scale_to_zero, "mnist was scaled to 0 workers through the management API. It gets 2 again."),
    ],
)
def test_serve_brings_back_what_management_took(served: Place, restored, take, said: str):
    record = served.record()
    take(served)
    again = served.bundle("serve", *SHIPPED)
    assert again.returncode == 0, again.stderr
    assert said in again.stderr
    assert "served again: mnist" in again.stdout
    assert answers(served)
    assert served.client.workers("mnist").ready == WORKERS
    assert served.record() == record


@pytest.fixture
def own_models(served: Place, tmp_path: Path) -> Iterator[partial]:
    """The command `serve` with a models folder of its own, which has MNIST with an expectation that fails."""
    folder = tmp_path / "mnist"
    shutil.copytree(MODELS / "mnist", folder, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / CONFIG_NAME
    config.write_text(config.read_text().replace('expect: "3"', 'expect: "4"'))
    kept = tmp_path / "kept"
    kept.mkdir()
    for file in served.store.glob("mnist.*"):
        shutil.copy(file, kept)
    yield partial(served.bundle, "serve", BUNDLE_MODELS=str(tmp_path))
    for file in kept.iterdir():
        shutil.copy(file, served.store)


def test_serve_with_a_failing_sample_leaves_the_running_server(served: Place, own_models: partial):
    record = served.record()
    failed = own_models("mnist")
    assert failed.returncode == 1
    assert "with '3', and its mnist/model-config.yaml expects '4'. The running server is untouched." in failed.stderr
    assert served.record() == record
    assert psutil.Process(record["pid"]).is_running()
    assert served.client.models() == sorted(SHIPPED)
    assert answers(served)


@pytest.fixture
def with_digits(place: Place, tmp_path: Path) -> partial:
    """The command `serve` for a server of MNIST, with a models folder that also has a copy of it, `digits`."""
    models = tmp_path / "models"
    for name in ("mnist", "digits"):
        shutil.copytree(MODELS / "mnist", models / name, ignore=shutil.ignore_patterns("__pycache__"))
    started = place.bundle("serve", "mnist")
    assert started.returncode == 0, started.stderr
    return partial(place.bundle, "serve", "mnist", "digits", BUNDLE_MODELS=str(models))


def test_serve_with_a_new_model_adds_it_without_a_restart(place: Place, with_digits: partial):
    record = place.record()
    url, content = f"{place.client.inference}/predictions/mnist", MNIST.sample_file.read_bytes()
    with Traffic(url, content, '"top_3_classes": [3') as load:
        load.wait_for(20)
        added = with_digits()
        load.wait_for(20)
    assert added.returncode == 0, added.stderr
    assert set(load.counts) == {200}, load.counts
    assert "digits is new. It is registered beside the other models." in added.stderr
    assert f"Already served by PID {record['pid']}; added: digits." in added.stdout
    assert place.record()["pid"] == record["pid"]
    assert place.client.workers("digits").ready == WORKERS
    assert first(place.client.predict("digits", content).json()).label == MNIST.bundle.expect
    assert "nothing has changed" in with_digits().stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('expect: "3"', 'expect: "4"', "with '3', and its digits/model-config.yaml expects '4'."),
        ("  threads: 1", "  threads: 1\n  precision: int8", "A worker of digits failed: "),
    ],
)
def test_serve_with_a_new_model_that_fails_leaves_the_server_as_it_was(
    place: Place, with_digits: partial, tmp_path: Path, old: str, new: str, message: str
):
    config = tmp_path / "models" / "digits" / CONFIG_NAME
    config.write_text(config.read_text().replace(old, new))
    record = place.record()
    failed = with_digits()
    assert failed.returncode == 1
    assert message in failed.stderr
    assert place.client.models() == ["mnist"]
    assert place.record() == record
    assert place.client.predict("mnist", MNIST.sample_file.read_bytes()).status_code == 200


def test_serve_names_the_file_and_the_setting_for_which_it_restarts_the_server(
    place: Place, with_digits: partial, tmp_path: Path
):
    config = tmp_path / "models" / "mnist" / CONFIG_NAME
    config.write_text(config.read_text().replace("maxBatchDelay: 1 ", "maxBatchDelay: 2 "))
    record = place.record()
    again = place.bundle("serve", "mnist", BUNDLE_MODELS=str(tmp_path / "models"), TS_JOB_QUEUE_SIZE="101")
    assert again.returncode == 0, again.stderr
    assert "  mnist: changed since its last build: mnist/model-config.yaml\n" in again.stderr
    assert (
        "The running server has other archives of mnist. Settings that have changed since the server's start: "
        "job_queue_size. It is restarted.\n"
    ) in again.stderr
    assert place.record()["pid"] != record["pid"]
