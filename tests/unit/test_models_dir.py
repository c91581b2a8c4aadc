"""A models folder outside the repository, named by BUNDLE_MODELS."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle import mar
from bundle.build.archive import archive, fingerprint
from bundle.catalog import CONFIG_NAME, ModelFolder, folders, select
from bundle.errors import BundleError
from bundle.paths import MODELS, ROOT, models_dir
from bundle.server.client import Client, curl_lines
from loadtest import targets
from loadtest.errors import LoadTestError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set BUNDLE_MODELS to a folder with one model: a copy of MNIST named `digits`."""
    models = tmp_path / "my models"
    shutil.copytree(MODELS / "mnist", models / "digits", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("BUNDLE_MODELS", str(models))
    return models


def test_models_are_found_in_the_folder_that_bundle_models_names(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    assert [folder.path for folder in folders()] == [elsewhere / "digits"]
    with pytest.raises(BundleError, match=f"There is no model 'mnist' in {elsewhere}/; there are: digits"):
        select(["mnist"])
    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setenv("BUNDLE_MODELS", elsewhere.name)
    assert [folder.path for folder in select([])] == [elsewhere / "digits"]


def test_all_selects_the_models_served_on_request_too(elsewhere: Path):
    shutil.copytree(elsewhere / "digits", elsewhere / "rare")
    config = elsewhere / "rare" / CONFIG_NAME
    config.write_text(config.read_text().replace("  handler: mnist", "  handler: mnist\n  served: on request"))
    assert [folder.name for folder in select([])] == ["digits"]
    assert [folder.name for folder in select(["all"])] == ["digits", "rare"]


@pytest.mark.parametrize("value", ["", None])
def test_models_dir_without_the_variable_is_the_repositorys(monkeypatch: pytest.MonkeyPatch, value: str | None):
    monkeypatch.delenv("BUNDLE_MODELS", raising=False)
    if value is not None:
        monkeypatch.setenv("BUNDLE_MODELS", value)
    assert models_dir() == targets.models_dir() == MODELS


def test_missing_models_folder_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUNDLE_MODELS", "none/such")
    with pytest.raises(BundleError, match="BUNDLE_MODELS is 'none/such', and there is no such folder"):
        folders()
    with pytest.raises(LoadTestError, match="BUNDLE_MODELS is 'none/such', and there is no such folder"):
        targets.choose()


def test_empty_models_folder_has_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUNDLE_MODELS", str(tmp_path))
    assert folders() == []
    with pytest.raises(BundleError, match="has no model folders.*BUNDLE_MODELS"):
        select(["mnist"])


@pytest.mark.slow
def test_archive_does_not_depend_on_the_folders_location(elsewhere: Path, tmp_path: Path):
    [folder] = select([])
    shutil.copytree(folder.path, tmp_path / "moved" / "digits")
    assert fingerprint(folder) == fingerprint(ModelFolder(tmp_path / "moved" / "digits"))
    built = archive(folder, tmp_path / "store")
    assert mar.manifest(built.path)["modelName"] == "digits"
    assert not archive(folder, tmp_path / "store").rebuilt


@pytest.mark.slow
def test_archive_command_uses_the_models_folder(elsewhere: Path, tmp_path: Path):
    environment = {**os.environ, "TS_MODEL_STORE": str(tmp_path / "store")}
    run = subprocess.run(
        [sys.executable, "-m", "bundle", "archive"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == ["digits.fingerprint", "digits.mar"]


@pytest.mark.slow
def test_add_model_writes_into_the_models_folder_and_the_servers_store(elsewhere: Path, tmp_path: Path):
    serialized, labels, store = tmp_path / "model.pt", tmp_path / "labels.json", tmp_path / "store"
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).eval()).save(serialized)
    labels.write_text(json.dumps([str(digit) for digit in range(10)]))
    command = [sys.executable, "-m", "bundle", "add-model", "mine", "--handler", "mnist"]
    command += ["--serialized", str(serialized), "--labels", str(labels)]
    environment = {**os.environ, "TS_MODEL_STORE": str(store)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{elsewhere}/mine" in run.stderr
    assert f"{store}/mine.mar" in run.stderr
    assert [folder.name for folder in folders()] == ["digits", "mine"]
    assert not archive(ModelFolder(elsewhere / "mine"), store).rebuilt


def test_curl_lines_name_a_sample_outside_of_the_repository(elsewhere: Path):
    client = Client("http://127.0.0.1:8080", "http://127.0.0.1:8081", None)
    lines = curl_lines(client, [*select([]), ModelFolder(MODELS / "text")])
    assert lines == [
        f"curl -T '{elsewhere}/digits/sample.png' http://127.0.0.1:8080/predictions/digits",
        "curl -T models/text/sample.txt http://127.0.0.1:8080/predictions/text",
        "curl http://127.0.0.1:8081/models",
    ]


def test_export_without_weights_says_to_train(elsewhere: Path, tmp_path: Path):
    (elsewhere / "digits" / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"Train the model first: its train\.py writes them"):
        archive(ModelFolder(elsewhere / "digits"), tmp_path / "store")


def test_load_test_targets_are_the_models_of_the_folder(elsewhere: Path):
    assert [(target.name, target.expect) for target in targets.choose()] == [("digits", "3")]
    assert set(targets.sections()) == {"digits"}
    with pytest.raises(LoadTestError, match=f"no model 'mnist' with a sample in {elsewhere}/; there are: digits"):
        targets.choose("mnist")
    (elsewhere / "digits" / CONFIG_NAME).write_text("bundle: [")
    with pytest.raises(LoadTestError, match=f"{elsewhere}/digits/{CONFIG_NAME} is not valid YAML"):
        targets.choose()
