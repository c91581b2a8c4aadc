"""Rollouts under load: a good version replaces the old one without a failed request, a bad version changes nothing."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.catalog import select
from bundle.paths import ROOT
from tests.server.place import Place, mnist_place, serving
from tests.support import models_expecting_four, reversioned
from tests.traffic import Traffic

[MNIST] = select(["mnist"])


@pytest.fixture(scope="module")
def rolling(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server of MNIST 1.0, for the tests of rollouts that change nothing."""
    place = mnist_place(tmp_path_factory.mktemp("rolling"), archives)
    with serving(place, "mnist"):
        yield place


def versions(place: Place) -> list[str]:
    return [described["modelVersion"] for described in place.client.versions("mnist")]


def traffic(place: Place) -> Traffic:
    url = f"{place.client.inference}/predictions/mnist"
    return Traffic(url, MNIST.sample_file.read_bytes(), '"top_3_classes": [3')


def test_rollout_under_load_replaces_the_version_and_no_request_fails(place: Place, tmp_path: Path):
    started = place.bundle("serve", "mnist")
    assert started.returncode == 0, started.stderr
    served = place.store / "mnist.mar"
    new = reversioned(served, "1.1", tmp_path / "new.mar")
    place.client.scale("mnist", "1.0", 3, 4)
    with traffic(place) as load:
        load.wait_for(50)
        rolled = place.bundle("rollout", "mnist", "--archive", str(new))
        load.wait_for(50)
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert f"Changed: the server of {place.environment['RUN_DIR']} (PID " in rolled.stderr
    assert set(load.counts) == {200}, load.counts
    assert versions(place) == ["1.1"]
    described = place.client.describe("mnist")
    assert (described["minWorkers"], described["maxWorkers"]) == (3, 4)
    # a restart serves the new version, and no other copy of it is left
    assert served.read_bytes() == new.read_bytes()
    assert not list(place.store.glob("*1.1*"))


def test_make_rollout_builds_the_folder_and_the_next_serve_changes_nothing(place: Place, tmp_path: Path):
    served = place.store / "mnist.mar"
    reversioned(served, "0.9", tmp_path / "old.mar").replace(served)
    assert place.bundle("serve", "mnist").returncode == 0
    assert versions(place) == ["0.9"]
    command = ["make", "rollout", "MODEL=mnist"]
    rolled = subprocess.run(command, cwd=ROOT, env=place.environment, capture_output=True, text=True, timeout=300)
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert versions(place) == ["1.0"]
    assert "nothing has changed" in place.bundle("serve", "mnist").stdout


def test_rollout_that_cannot_succeed_ends_before_the_build(rolling: Place):
    for model, status, message in (
        ("text", 3, "text is not served; there are: mnist."),
        ("mnist", 1, "Version 1.0 of"),
    ):
        refused = rolling.bundle("rollout", model)
        assert refused.returncode == status
        assert message in refused.stderr
        assert "archive" not in refused.stderr


def test_rollout_of_the_served_version_is_refused(rolling: Place):
    refused = rolling.bundle("rollout", "mnist", "--archive", str(rolling.store / "mnist.mar"))
    assert refused.returncode == 1
    assert "Version 1.0 of mnist is served already" in refused.stderr
    assert versions(rolling) == ["1.0"]


@pytest.mark.parametrize("fault", ["no worker comes up", "not an archive", "another answer"])
def test_rollout_of_a_bad_version_changes_nothing(rolling: Place, tmp_path: Path, fault: str):
    served = rolling.store / "mnist.mar"
    before = served.read_bytes()
    new = tmp_path / "new.mar"
    if fault == "not an archive":
        new.write_bytes(b"PK")
    elif fault == "no worker comes up":
        reversioned(served, "1.1", new, without="index_to_name.json")
    else:
        reversioned(served, "1.1", new)
    wrong = fault == "another answer"
    models = {"BUNDLE_MODELS": str(models_expecting_four(tmp_path / "models"))} if wrong else {}
    message = {
        "no worker comes up": "the archive has no index_to_name.json",
        "not an archive": "is not a model archive",
        "another answer": "answered its own sample",
    }[fault]
    with traffic(rolling) as load:
        failed = rolling.bundle("rollout", "mnist", "--archive", str(new), **models)
        load.wait_for(20)
    assert failed.returncode == 1, failed.stdout
    assert message in failed.stderr
    assert set(load.counts) == {200}, load.counts
    assert versions(rolling) == ["1.0"]
    assert served.read_bytes() == before
    assert [file.name for file in rolling.store.glob("*.mar")] == ["mnist.mar"]
