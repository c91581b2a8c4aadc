"""`make test-cluster` says what is missing, and begins no test."""

import subprocess
import sys
from pathlib import Path

import pytest

from bundle.errors import BundleError
from bundle.paths import ROOT
from tests.cluster import release


@pytest.fixture(autouse=True)
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helm is there, and a kubectl that succeeds."""
    monkeypatch.setenv("IMAGE", "torchserve-bundle:latest")
    monkeypatch.setattr(release, "HELM", "true")
    monkeypatch.setattr(release, "KUBECTL", "true")


def test_image_is_returned_if_a_cluster_answers():
    assert release.image_to_test() == "torchserve-bundle:latest"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"HELM": None}, "Helm is missing: make helm"),
        ({"KUBECTL": None}, "kubectl is missing. Install it, and choose a cluster"),
        ({"KUBECTL": "false"}, "No cluster answers. `kubectl get nodes` shows the reason."),
    ],
)
def test_missing_program_or_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, missing: dict, message: str):
    for name, value in missing.items():
        monkeypatch.setattr(release, name, value)
    with pytest.raises(BundleError, match=message):
        release.image_to_test()


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        ("torchserve-bundle", "no tag"),
        ("registry:5000/torchserve-bundle", "no tag"),
        ("torchserve-bundle:", "an empty tag"),
        ("registry:5000/torchserve-bundle:", "an empty tag"),
        (f"torchserve-bundle@sha256:{'a' * 64}", "a digest"),
        (f"torchserve-bundle:latest@sha256:{'a' * 64}", "a digest"),
        ("torchserve-bundle@sha256:", "a digest"),
    ],
)
def test_image_without_a_tag_or_with_a_digest_is_refused(monkeypatch: pytest.MonkeyPatch, image: str, fault: str):
    """The chart would take its appVersion in place of an empty tag, so another image would be tested."""
    monkeypatch.setenv("IMAGE", image)
    with pytest.raises(BundleError) as refused:
        release.image_to_test()
    assert str(refused.value).startswith(f"IMAGE={image} has {fault}. Name it by a tag: make test-cluster IMAGE=")


@pytest.mark.parametrize("image", ["registry:5000/torchserve-bundle:0.2.0", "team/torchserve-bundle:a"])
def test_image_of_a_registry_is_returned(monkeypatch: pytest.MonkeyPatch, image: str):
    monkeypatch.setenv("IMAGE", image)
    assert release.image_to_test() == image


@pytest.mark.slow
def test_no_test_begins_without_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("IMAGE")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cluster", "tests/cluster", f"--basetemp={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: No image is named." in done.stdout + done.stderr
    assert "make test-cluster IMAGE=" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
