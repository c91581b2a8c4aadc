"""`serve`, `run` and `rollout` refuse changed and unsigned archives before they change anything.

test_archive_safety.py has the same checks for registrations, which TorchServe handles without the bundle.
"""

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
from tests.server.place import Place
from tests.support import reversioned

[MNIST] = select(["mnist"])
DIGIT = MNIST.sample_file.read_bytes()


@every_refusal
def test_rollout_of_a_refused_archive_changes_nothing(trusting: Place, good: Path, tmp_path: Path, wrong: Callable):
    before = good.read_bytes()
    rolled = trusting.bundle("rollout", "mnist", "--archive", str(wrong(good, tmp_path / "new.mar")))
    assert rolled.returncode == 1
    assert "new.mar is refused: " in rolled.stderr
    assert REFUSED[wrong] in rolled.stderr.replace("\n", " ")
    assert good.read_bytes() == before
    assert sorted(file.name for file in good.parent.iterdir()) == ["mnist.fingerprint", "mnist.mar"]


def test_rollout_of_signed_versions_forward_and_back_succeeds(trusting: Place, good: Path, key: Path, tmp_path: Path):
    """Without --archive, `rollout` builds and signs the folder's version."""
    new = without_manifest(reversioned(good, "0.9", tmp_path / "0.9.mar"), tmp_path / "new.mar")
    seal(new, key)
    for arguments, version in ((["--archive", str(new)], "0.9"), ([], "1.0")):
        rolled = trusting.bundle("rollout", "mnist", *arguments)
        assert rolled.returncode == 0, rolled.stdout + rolled.stderr
        assert [described["modelVersion"] for described in trusting.client.versions("mnist")] == [version]


@pytest.mark.parametrize("command", ["serve", "run"])
@every_refusal
def test_start_with_a_refused_archive_starts_nothing(
    place: Place, trusting: Place, good: Path, command: str, wrong: Callable
):
    shutil.copy(good.with_suffix(".fingerprint"), place.store)
    wrong(good, place.store / "mnist.mar")
    place.environment.update({name: trusting.environment[name] for name in ("SIGNING_KEY", "TRUSTED_KEY")})
    address = ["--address", f"127.0.0.1:{free_ports(1)[0]}"] if command == "run" else []
    failed = place.bundle(command, "mnist", *address)
    assert failed.returncode == 1, failed.stdout
    assert "mnist.mar is refused: " in failed.stderr.strip().splitlines()[-1]
    assert REFUSED[wrong] in failed.stderr
    assert not place.processes()


def test_start_without_a_key_refuses_changed_files_and_serves_archives_without_checksums(
    place: Place, good: Path, key: Path
):
    """Archives of other builders have no checksums."""
    shutil.copy(good.with_suffix(".fingerprint"), place.store)
    one_bit(good, place.store / "mnist.mar")
    failed = place.bundle("serve", "mnist")
    assert failed.returncode == 1
    assert "mnist.mar is refused: 'model.pt' was changed. Delete it and build it again (make archive)" in failed.stderr
    without_manifest(good, place.store / "mnist.mar")
    served = place.bundle("serve", "mnist")
    assert served.returncode == 0, served.stdout + served.stderr
    one_bit(good, place.store / "other.mar")
    other = {"url": "other.mar", "model_name": "other"}
    assert requests.post(f"{place.client.management}/models", params=other, timeout=300).status_code == 500
    assert place.client.models() == ["mnist"]
    # a new key restarts the server, but not if its archive would then be refused
    assert "mnist.mar is refused: it is not signed" in place.bundle("serve", "mnist", TRUSTED_KEY=f"{key}.pub").stderr
    assert first(place.client.predict("mnist", DIGIT).json()).label == MNIST.bundle.expect


def test_make_keygen_writes_a_pair_and_never_overwrites_it(tmp_path: Path):
    command = ["make", "keygen", f"KEY={tmp_path / 'a.key'}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.key", "a.key.pub"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode != 0
    assert "exists already, and keys are never overwritten" in again.stderr
