"""The keys of model-config.yaml: TorchServe ignores unknown ones silently, the commands reject them."""

import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

from bundle.catalog import CONFIG_KEYS, CONFIG_NAME, TORCHSERVE_KEYS, ModelFolder, folders
from bundle.errors import BundleError


def folder_with(config: str, folder: Path, handler: str = "mnist") -> ModelFolder:
    (folder / CONFIG_NAME).write_text(f"{config}\nbundle: {{handler: {handler}}}\n")
    return ModelFolder(folder)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("batchsize: 8", "batchSize"),
        ("batch_size: 8", "batchSize"),
        ("max_batch_delay: 8", "maxBatchDelay"),
        ("maxWorker: 2", "maxWorkers"),
        ("ResponseTimeout: 30", "responseTimeout"),
        ("jobQueuesize: 10", "jobQueueSize"),
        ("handlers: {}", "handler"),
        ("pacience: fixed", "patience"),
    ],
)
@pytest.mark.parametrize("handler", ["mnist", "./handler.py"])
def test_misspelt_setting_is_rejected_with_the_right_one(tmp_path: Path, written: str, right: str, handler: str):
    key = written.partition(":")[0]
    with pytest.raises(BundleError, match=f"model-config.yaml: unknown setting '{key}'. Write '{right}'."):
        _ = folder_with(written, tmp_path, handler).bundle


def test_setting_that_nothing_reads_is_rejected(tmp_path: Path):
    with pytest.raises(
        BundleError, match="unknown setting 'top_k'. What the handler reads is in the section `handler:"
    ):
        _ = folder_with("top_k: 5", tmp_path).config


def test_handler_of_the_folder_may_read_further_keys(tmp_path: Path):
    assert folder_with("top_k: 5", tmp_path, "./handler.py").config["top_k"] == 5


def test_every_known_setting_is_accepted(tmp_path: Path):
    assert folder_with("\n".join(f"{key}: 1" for key in (*TORCHSERVE_KEYS, "patience")), tmp_path).bundle
    assert [folder.name for folder in folders() if set(folder.config) - set(CONFIG_KEYS)] == []


def test_known_settings_are_those_of_the_installed_torchserve():
    """After an upgrade, compare the list with the new release's ModelConfig."""
    with zipfile.ZipFile(str(files("ts") / "frontend" / "model-server.jar")) as jar:
        compiled = jar.read("org/pytorch/serve/archive/model/ModelConfig.class")
    assert [key for key in TORCHSERVE_KEYS if key.encode() not in compiled] == []
