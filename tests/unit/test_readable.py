"""The files that containers mount, after a clone with umask 077: only their owner can read them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bundle.paths import ROOT


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    folder = shutil.copytree(ROOT / "docker", tmp_path / "docker")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    return folder


def readable(docker: Path, *mounted: Path) -> subprocess.CompletedProcess:
    command = ["sh", docker / "readable.sh", *mounted]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_mounted_files_become_readable_and_no_other_mode_changes(docker: Path):
    assert readable(docker).returncode == 0
    for name in ("nginx", "prometheus", "grafana"):
        for path in (docker / name, *(docker / name).rglob("*")):
            if path.parent.name != "tls":
                assert path.stat().st_mode & 0o777 == (0o705 if path.is_dir() or path.suffix == ".sh" else 0o604), path
    assert (docker / "compose.yaml").stat().st_mode & 0o777 == 0o600  # only Compose reads it, as its owner


def test_private_key_that_the_proxy_cannot_read_is_named_and_not_opened(docker: Path):
    key = docker / "nginx" / "tls" / "tls.key"
    key.touch(mode=0o600)
    refused = readable(docker)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"error: The proxy cannot read {key} as user 101. As root: chown 101 {key}\n",
    )
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["mnist.mar", ""])
def test_archives_that_the_container_cannot_read_are_named(docker: Path, tmp_path: Path, name: str):
    store = tmp_path / "store"
    store.mkdir(mode=0o755)
    (store / "mnist.mar").touch(mode=0o644)
    assert readable(docker, store).returncode == 0
    (store / name).chmod(0o700)
    refused = readable(docker, store)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"error: The container's user cannot read {store / name}. Let it: chmod -R o+rX {store}\n",
    )


def test_images_take_files_of_the_checkout_only_from_the_stage_that_makes_them_readable():
    stages = (ROOT / "docker" / "Dockerfile").read_text().split("\nFROM ")
    for stage in stages:
        if stage.partition("\n")[0].endswith((" AS server", " AS locust", " AS page")):
            copies = [line for line in stage.splitlines() if line.startswith("COPY ")]
            assert [line for line in copies if "--from=" not in line and " requirements/" not in line] == []
