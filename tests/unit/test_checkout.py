"""A checkout is the same, byte for byte, with any setting of git, and its scripts run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bundle.paths import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="git or the repository is missing"
)
SHELLS = {"#!/bin/sh": "sh", "#!/usr/bin/env bash": "bash"}


def run(*command: str, folder: Path = ROOT) -> str:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def check_out(target: Path, autocrlf: str) -> Path:
    """Write every tracked file as a clone with this value of core.autocrlf does."""
    run("git", "-c", f"core.autocrlf={autocrlf}", "checkout-index", "--all", f"--prefix={target}/")
    return target


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Check out with core.autocrlf=true, the default of Git for Windows."""
    return check_out(tmp_path_factory.mktemp("windows"), "true")


def test_autocrlf_changes_no_file(windows: Path, tmp_path: Path):
    plain = check_out(tmp_path / "plain", "false")
    names = run("git", "ls-files", "-z").rstrip("\0").split("\0")
    assert len(names) > 100
    assert [name for name in names if (windows / name).read_bytes() != (plain / name).read_bytes()] == []


def test_autocrlf_leaves_scripts_that_parse(windows: Path):
    checked = 0
    for file in filter(Path.is_file, windows.rglob("*")):
        line = file.read_bytes().partition(b"\n")[0].decode(errors="replace").rstrip("\r")
        if line in SHELLS:
            run(SHELLS[line], "-n", str(file))
            assert b"\r" not in file.read_bytes(), file
            checked += 1
    assert checked >= 5
    assert "usage: make COMMAND" in run("make", folder=windows)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".safetensors", ".wav"])
def test_binary_files_are_marked(suffix: str):
    shown = run("git", "check-attr", "text", "--", f"any{suffix}")
    assert shown.endswith("text: unset\n")


def test_test_files_have_unique_names():
    """Pytest cannot import two test files of one name, whatever their folders are."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
