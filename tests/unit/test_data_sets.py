"""A data set that is missing and cannot be downloaded."""

import importlib
import urllib.request
from pathlib import Path

import pytest

from models import data_sets
from tests.shipped import SHIPPED


@pytest.mark.parametrize("model", SHIPPED)
def test_failed_download_ends_training_with_the_reason_and_a_hint(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:1")  # nothing listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # it may have been made with other proxies
    train = importlib.import_module(f"models.{model}.train")
    with pytest.raises(SystemExit, match=f"(?s)is not in {tmp_path}, and its download failed.*refused.*DATA_DIR"):
        train.load(tmp_path) if model == "text" else train.load(tmp_path, "train")


def test_missing_archive_ends_training_with_its_source_and_a_hint(tmp_path: Path):
    from models.avdigits.train import load_clips
    from models.cells.train import load as load_cells
    from models.membrane.train import load as load_slices

    for name, load in (
        ("bccd.zip", lambda: load_cells(tmp_path, "test")),
        ("isbi2012-membrane.zip", lambda: load_slices(tmp_path)),
        ("fsdd.zip", lambda: load_clips(tmp_path)),
    ):
        with pytest.raises(SystemExit, match=f"(?s){tmp_path / name} is missing.*https://github.com/.*DATA_DIR"):
            load()


def test_file_that_is_not_a_zip_file_ends_training(tmp_path: Path):
    (tmp_path / "bccd.zip").write_text("not a ZIP file")
    with pytest.raises(SystemExit, match="not a ZIP file"):
        data_sets.open_archive(tmp_path / "bccd.zip", "BCCD", "somewhere")


def test_error_that_is_not_of_a_download_stays_loud(tmp_path: Path):
    with pytest.raises(KeyError), data_sets.downloaded("MNIST", tmp_path):
        {}["a bug"]
