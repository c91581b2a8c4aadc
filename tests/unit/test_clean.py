"""`make clean`, in a copy of the repository's outline."""

import shutil
import subprocess
from pathlib import Path

from bundle.paths import ROOT


def test_clean_leaves_archives_that_the_bundle_did_not_build(tmp_path: Path):
    store = tmp_path / "model_store"
    store.mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    theirs = {"README.md", "birds.mar", "no-archive", ".seeded"}
    built = {"mnist.mar", "mnist.fingerprint", "two words.mar", "two words.fingerprint"}
    left_by_kills = {"rollout-mnist-2.0.mar", ".mnist.mar-0123abcd", "lost.fingerprint"}
    for name in theirs | built | left_by_kills:
        (store / name).touch()
    (tmp_path / "build").mkdir()
    cleaned = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert cleaned.returncode == 0, cleaned.stderr
    assert {file.name for file in store.iterdir()} == theirs
    assert not (tmp_path / "build").exists()
    again = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
