"""What is not what was built, or not signed by whom it should, is refused before a start or a rollout touches anything
that serves. Registrations, which pass the bundle by, are in test_archive_safety.py."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.samples import first
from bundle.server.ports import free_ports
from bundle.signing import seal
from tests.altered import REFUSED, every_refusal, one_bit, without_manifest
from tests.server.conftest import Place
from tests.server.test_operation import children_of
from tests.support import reversioned

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()


@every_refusal
def test_a_rollout_is_refused(trusting: Place, good: Path, tmp_path: Path, wrong: Callable):
    """Before anything is copied into the store, or registered."""
    before = good.read_bytes()
    rolled = trusting.bundle("rollout", "mnist", "--archive", str(wrong(good, tmp_path / "new.mar")))
    assert rolled.returncode == 1
    assert "new.mar is refused: " in rolled.stderr
    assert REFUSED[wrong] in rolled.stderr.replace("\n", " ")
    assert good.read_bytes() == before
    assert sorted(file.name for file in good.parent.iterdir()) == ["mnist.fingerprint", "mnist.mar"]


def test_a_signed_version_rolls_out_and_back(trusting: Place, good: Path, key: Path, tmp_path: Path):
    """`make rollout` builds and signs."""
    new = without_manifest(reversioned(good, "0.9", tmp_path / "0.9.mar"), tmp_path / "new.mar")
    seal(new, key)
    for arguments, version in ((["--archive", str(new)], "0.9"), ([], "1.0")):
        rolled = trusting.bundle("rollout", "mnist", *arguments)
        assert rolled.returncode == 0, rolled.stdout + rolled.stderr
        assert [described["modelVersion"] for described in trusting.client.versions("mnist")] == [version]


@pytest.mark.parametrize("command", ["serve", "run"])
@every_refusal
def test_a_start_is_refused(place: Place, trusting: Place, good: Path, tmp_path: Path, command: str, wrong: Callable):
    """Before anything is started."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(good.with_suffix(".fingerprint"), store)
    wrong(good, store / "mnist.mar")
    keys = {name: trusting.environment[name] for name in ("SIGNING_KEY", "TRUSTED_KEY")}
    place.environment.update(keys, TS_MODEL_STORE=str(store))
    address = ["--address", f"127.0.0.1:{free_ports(1)[0]}"] if command == "run" else []
    failed = place.bundle(command, "mnist", *address)
    assert failed.returncode == 1, failed.stdout
    assert "mnist.mar is refused: " in failed.stderr.strip().splitlines()[-1]
    assert REFUSED[wrong] in failed.stderr
    assert not children_of(place)


def test_without_a_key_checksums_are_held_to(place: Place, good: Path, key: Path, tmp_path: Path):
    """And an archive without a manifest is served, as other builders' are."""
    store = tmp_path / "store"
    store.mkdir()
    shutil.copy(good.with_suffix(".fingerprint"), store)
    place.environment["TS_MODEL_STORE"] = str(store)
    one_bit(good, store / "mnist.mar")
    failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    assert "mnist.mar is refused: 'model.pt' was changed. Delete it and build it again (make archive)" in failed.stderr
    without_manifest(good, store / "mnist.mar")
    served = place.bundle("serve", "mnist")
    assert served.returncode == 0, served.stdout + served.stderr
    one_bit(good, store / "other.mar")
    asked = {"url": "other.mar", "model_name": "other"}
    assert requests.post(f"{place.client.management}/models", params=asked, timeout=300).status_code == 500
    assert place.client.models() == ["mnist"]
    # a key is a setting like others, with which a server that does not have it is started again: not if that would fail
    assert "mnist.mar is refused: it is not signed" in place.bundle("serve", "mnist", TRUSTED_KEY=f"{key}.pub").stderr
    assert first(place.client.predict("mnist", DIGIT).json()).label == MNIST.bundle.expect


def test_make_keygen(tmp_path: Path):
    command = ["make", "keygen", f"KEY={tmp_path / 'a.key'}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.key", "a.key.pub"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode != 0
    assert "exists already, and keys are never overwritten" in again.stderr
