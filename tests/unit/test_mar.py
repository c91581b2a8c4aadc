"""Model archives: reading them, and copying them with other members."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bundle import mar
from bundle.errors import BundleError
from bundle.signing import SEALS, UNSEALED, check, make_keys, seal

MANIFEST = {"modelName": "m", "modelVersion": "1.0", "handler": "h.py", "configFile": "c.yaml"}


def write_archive(file: Path, manifest: object = MANIFEST, **members: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(mar.MANIFEST, json.dumps({"model": manifest}))
        for name, content in ({"c.yaml": "batchSize: 8\n", "h.py": "pass\n"} | members).items():
            archive.writestr(name, content)
    return file


def test_disk_that_is_full_is_not_the_archives_fault(tmp_path: Path):
    archive = write_archive(tmp_path / "m.mar")
    with pytest.raises(OSError, match="No space left"), mar.opened(archive) as file:
        Path("/dev/full").write_bytes(file.read("h.py"))


def test_archive_is_read(tmp_path: Path):
    archive = write_archive(tmp_path / "m.mar")
    assert mar.manifest(archive) == MANIFEST
    assert mar.version(archive) == "1.0"
    assert mar.config(archive) == {"batchSize": 8}
    assert mar.names(archive) == [mar.MANIFEST, "c.yaml", "h.py"]
    assert mar.read(archive, "h.py") == b"pass\n"
    assert [name for name, _ in mar.contents(archive)] == mar.names(archive)
    assert (mar.unpack(archive, tmp_path / "unpacked") / "h.py").read_text() == "pass\n"


def test_config_without_a_config_file_is_empty(tmp_path: Path):
    assert mar.config(write_archive(tmp_path / "m.mar", {"modelVersion": "1.0"})) == {}
    assert mar.config(write_archive(tmp_path / "e.mar", **{"c.yaml": ""})) == {}


def test_rewrite_replaces_adds_and_removes_members(tmp_path: Path):
    archive, target = write_archive(tmp_path / "m.mar"), tmp_path / "copy.mar"
    members = {"c.yaml": b"batchSize: 9\n", "h.py": None, "new.txt": b"new", "missing": None}
    assert mar.rewrite(archive, target, members) == target
    assert dict(mar.contents(target)) == {
        mar.MANIFEST: mar.read(archive, mar.MANIFEST),
        "c.yaml": b"batchSize: 9\n",
        "new.txt": b"new",
    }


def test_rewrite_keeps_seals_unless_they_are_left_out(tmp_path: Path):
    archive, key = write_archive(tmp_path / "m.mar"), tmp_path / "signing.key"
    public = make_keys(key)
    seal(archive, key)
    kept = mar.rewrite(archive, tmp_path / "kept.mar", {"h.py": b"other\n"})
    assert set(mar.names(kept)) >= set(SEALS)
    with pytest.raises(BundleError, match="'h.py' was changed"):
        check(kept, public)
    anew = mar.rewrite(archive, tmp_path / "anew.mar", {"h.py": b"other\n"} | UNSEALED)
    assert not set(mar.names(anew)) & set(SEALS)
    seal(anew, key)
    check(anew, public)


BROKEN = {
    "missing": lambda file: None,
    "empty": lambda file: file.write_bytes(b""),
    "not a ZIP file": lambda file: file.write_bytes(b"PK"),
    "no manifest": lambda file: zipfile.ZipFile(file, "w").close(),
    "manifest without a model": lambda file: write_archive(file, None),
    "manifest that is a string": lambda file: write_archive(file, "m"),
    "truncated": lambda file: file.write_bytes(write_archive(file).read_bytes()[:-30]),
}


@pytest.mark.parametrize("read", [mar.manifest, mar.version, mar.config])
@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN)
def test_broken_archive_raises_that_it_is_not_an_archive(tmp_path: Path, write: Callable, read: Callable):
    write(tmp_path / "m.mar")
    with pytest.raises(BundleError, match=r"m\.mar is not a model archive: "):
        read(tmp_path / "m.mar")


@pytest.mark.parametrize("manifest", [{}, {"modelVersion": None}, {"modelVersion": 1}])
def test_version_missing_from_the_manifest_raises(tmp_path: Path, manifest: dict):
    with pytest.raises(BundleError, match="its manifest has no modelVersion"):
        mar.version(write_archive(tmp_path / "m.mar", manifest))


def test_rewrite_of_a_damaged_member_raises(tmp_path: Path):
    archive = write_archive(tmp_path / "m.mar", weights="0123456789" * 9)
    archive.write_bytes(archive.read_bytes().replace(b"0123456789", b"0123456780", 1))
    with pytest.raises(BundleError, match="is not a model archive: Bad CRC-32"):
        mar.rewrite(archive, tmp_path / "copy.mar", {})


def test_rewrite_into_a_missing_folder_does_not_blame_the_archive(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        mar.rewrite(write_archive(tmp_path / "m.mar"), tmp_path / "missing" / "copy.mar", {})
