"""Model archives: what is read out of them, and copies with other members."""

import json
import zipfile
from pathlib import Path

import pytest

from bundle import mar
from bundle.errors import BundleError
from bundle.signing import SEALS, UNSEALED, check, make_keys, seal

MANIFEST = {"modelName": "m", "modelVersion": "1.0", "handler": "h.py", "configFile": "c.yaml"}


def archived(file: Path, manifest: object = MANIFEST, **members: str) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(mar.MANIFEST, json.dumps({"model": manifest}))
        for name, content in ({"c.yaml": "batchSize: 8\n", "h.py": "pass\n"} | members).items():
            archive.writestr(name, content)
    return file


def test_an_archive_is_read(tmp_path: Path):
    archive = archived(tmp_path / "m.mar")
    assert mar.manifest(archive) == MANIFEST
    assert mar.version(archive) == "1.0"
    assert mar.config(archive) == {"batchSize": 8}
    assert mar.names(archive) == [mar.MANIFEST, "c.yaml", "h.py"]
    assert mar.read(archive, "h.py") == b"pass\n"
    assert [name for name, _ in mar.contents(archive)] == mar.names(archive)
    assert (mar.unpack(archive, tmp_path / "unpacked") / "h.py").read_text() == "pass\n"


def test_config_without_a_config_file_is_empty(tmp_path: Path):
    assert mar.config(archived(tmp_path / "m.mar", {"modelVersion": "1.0"})) == {}
    assert mar.config(archived(tmp_path / "e.mar", **{"c.yaml": ""})) == {}


def test_rewrite_replaces_adds_and_leaves_out(tmp_path: Path):
    archive, target = archived(tmp_path / "m.mar"), tmp_path / "copy.mar"
    assert (
        mar.rewrite(archive, target, {"c.yaml": b"batchSize: 9\n", "h.py": None, "new.txt": b"new", "x": None})
        == target
    )
    assert dict(mar.contents(target)) == {
        mar.MANIFEST: mar.read(archive, mar.MANIFEST),
        "c.yaml": b"batchSize: 9\n",
        "new.txt": b"new",
    }


def test_a_rewritten_archive_keeps_its_seals_or_is_sealed_anew(tmp_path: Path):
    archive, key = archived(tmp_path / "m.mar"), tmp_path / "signing.key"
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
    "without a manifest": lambda file: zipfile.ZipFile(file, "w").close(),
    "a manifest without a model": lambda file: archived(file, None),
    "a manifest that is a text": lambda file: archived(file, "m"),
    "cut off": lambda file: file.write_bytes(archived(file).read_bytes()[:-30]),
}


@pytest.mark.parametrize("ask", [mar.manifest, mar.version, mar.config])
@pytest.mark.parametrize("made", BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_an_error(tmp_path: Path, made, ask):
    made(tmp_path / "m.mar")
    with pytest.raises(BundleError, match=r"m\.mar is not a model archive: "):
        ask(tmp_path / "m.mar")


@pytest.mark.parametrize("manifest", [{}, {"modelVersion": None}, {"modelVersion": 1}])
def test_a_manifest_without_a_version_is_an_error(tmp_path: Path, manifest: dict):
    with pytest.raises(BundleError, match="its manifest has no modelVersion"):
        mar.version(archived(tmp_path / "m.mar", manifest))


def test_a_member_that_is_damaged_is_an_error(tmp_path: Path):
    archive = archived(tmp_path / "m.mar", weights="0123456789" * 9)
    archive.write_bytes(archive.read_bytes().replace(b"0123456789", b"0123456780", 1))
    with pytest.raises(BundleError, match="is not a model archive: Bad CRC-32"):
        mar.rewrite(archive, tmp_path / "copy.mar", {})


def test_an_error_of_the_copy_is_not_the_archives(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        mar.rewrite(archived(tmp_path / "m.mar"), tmp_path / "none" / "copy.mar", {})
