"""The order of versions, and what an image's archives replace in the store."""

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from bundle import mar
from bundle.errors import BundleError
from bundle.supervisor.supervisor import install_archives
from bundle.versions import is_older

ORDERS = [
    ["1.0", "1.1", "1.9", "1.10", "2.0", "10.0"],
    ["v1", "v2", "v10"],
    ["1.0-dev", "1.0-alpha", "1.0-alpha2", "1.0-beta", "1.0-rc1", "1.0-rc2", "1.0-rc10", "1.0", "1.0-gpu", "1.0.1"],
    ["1.0a1", "1.0b1", "1.0rc1", "v1.0", "V1.0.1"],
    ["2023-12-31", "2024-01-01", "2024-01-31", "2024-02-01"],
    ["20231231", "20240101", "20240101-2"],
]
UNORDERED = [("1.0", "1"), ("v1", "1.0.0"), ("blue", "green"), ("3f2a9c1", "1.0"), ("1.0", "abcdef0"), ("main", "1.0")]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
def test_versions_have_their_usual_order(order: list[str]):
    for earlier, later in pairwise(order):
        assert is_older(earlier, later), (earlier, later)
        assert not is_older(later, earlier), (earlier, later)


@pytest.mark.parametrize(("one", "other"), UNORDERED)
def test_equal_versions_words_and_hashes_have_no_order(one: str, other: str):
    assert not is_older(one, other)
    assert not is_older(other, one)


def archive(folder: Path, version: str) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "things.mar", "w") as file:
        file.writestr(mar.MANIFEST, json.dumps({"model": {"modelName": "things", "modelVersion": version}}))
    return folder / "things.mar"


@pytest.mark.parametrize(
    ("present", "new", "installed"),
    [
        ("v1", "v2", True),
        ("v2", "v1", False),
        ("1.10", "1.9", False),
        ("1.0", "1.0-rc1", False),
        ("2024-01-01", "2024-02-01", True),
        ("blue", "green", True),
        ("3f2a9c1", "0d4e5f6", True),
    ],
)
def test_archive_of_an_image_is_installed_unless_it_is_older(tmp_path: Path, present: str, new: str, installed: bool):
    archive(tmp_path / "store", present)
    archive(tmp_path / "image", new)
    report: list[str] = []
    install_archives(tmp_path / "image", tmp_path / "store", {"things"}, report.append)
    assert mar.version(tmp_path / "store" / "things.mar") == (new if installed else present)
    assert ("was installed" if installed else "is older") in report[0]


@pytest.mark.parametrize("version", ["", "release candidate", "1/2", "..", "1.0+cu118", "größe", "-1"])
def test_version_that_a_url_cannot_hold_is_refused_by_name(tmp_path: Path, version: str):
    archive(tmp_path / "image", version)
    with pytest.raises(BundleError, match=r"things\.mar has the version .* letters, digits, '\.', '-' and '_'"):
        install_archives(tmp_path / "image", archive(tmp_path / "store", "1.0").parent, {"things"}, print)
