"""The four models that ship: as good as promised, small enough for git, and the same once exported."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch

from bundle.build.export import export, load
from bundle.build.handler import load_handler
from bundle.catalog import select
from bundle.paths import ROOT

PROMISED = {"mnist": 0.995, "image": 0.9125, "audio": 0.882, "text": 0.925}
TEST_INPUTS = {"mnist": 10_000, "image": 10_000, "audio": 834, "text": 4_500}
FOLDERS = {folder.name: folder for folder in select(list(PROMISED))}


def metrics(model: str) -> dict:
    return json.loads((FOLDERS[model].path / "metrics.json").read_text())


def test_the_four_are_served_without_asking():
    assert set(FOLDERS) <= {folder.name for folder in select([])}


@pytest.mark.parametrize("model", PROMISED)
def test_serving_needs_nothing_of_training(model):
    """`make serve` installs no training library."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('lightning', 'torchmetrics', 'kornia')));"
    code = f"{hidden} import models.{model}.model as m; m.build()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("model", PROMISED)
def test_the_promised_accuracy_is_that_of_this_model_on_its_whole_test_set(model):
    """As the run that trained it wrote it down; `test_served_accuracy.py` measures again, where the data set is."""
    measured = metrics(model)
    assert measured["accuracy"] >= PROMISED[model]
    assert sum(map(sum, measured["confusion_matrix"])) == measured["data"]["test"] == TEST_INPUTS[model]
    module, _ = load(FOLDERS[model])
    assert measured["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert re.fullmatch("[0-9a-f]{40}", measured["commit"]), "trained from code that is not in git"


@pytest.mark.parametrize("model", PROMISED)
def test_the_figures_agree_with_the_confusion_matrix(model):
    measured = metrics(model)
    matrix = torch.tensor(measured["confusion_matrix"], dtype=torch.float64)
    correct = matrix.diagonal()
    f1 = 2 * correct / (matrix.sum(0) + matrix.sum(1)).clamp(min=1)
    assert (correct.sum() / matrix.sum()).item() == pytest.approx(measured["accuracy"], abs=1e-4)
    assert f1.mean().item() == pytest.approx(measured["macro_f1"], abs=1e-3)


def test_out_of_scope_text_is_recognised():
    assert metrics("text")["oos_recall_at_95_kept"] >= 0.75


@pytest.mark.parametrize("model", PROMISED)
def test_weights_are_small_and_labels_complete(model):
    folder = FOLDERS[model]
    assert (folder.path / "weights.safetensors").stat().st_size < 6_000_000
    module, [inputs, *_] = load(folder, load_handler(folder))
    with torch.inference_mode():
        assert module(*inputs).shape == (1, len(folder.labels()))
    assert folder.bundle.expect in folder.labels()


@pytest.mark.parametrize("model", PROMISED)
def test_an_export_computes_what_the_eager_module_does(model, tmp_path):
    """On other inputs and batch sizes than those that `export` compares by itself."""
    export(FOLDERS[model], load_handler(FOLDERS[model]), tmp_path / "model.pt")
    exported = torch.jit.load(tmp_path / "model.pt")
    module = importlib.import_module(f"models.{model}.model")
    eager = module.build()
    with torch.inference_mode():
        for size in (2, 5):
            inputs = module.example_inputs(size)
            torch.testing.assert_close(exported(*inputs), eager(*inputs), rtol=1e-4, atol=1e-4)


def test_padding_changes_no_intent():
    module = importlib.import_module("models.text.model")
    eager = module.build()
    ids, mask = module.example_inputs(4)
    padded = torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(mask, (0, 9))
    with torch.inference_mode():
        torch.testing.assert_close(eager(*padded), eager(ids, mask), rtol=1e-4, atol=1e-4)


def test_silence_is_a_number():
    module = importlib.import_module("models.audio.model")
    with torch.inference_mode():
        probabilities = module.build()(torch.zeros(1, 16000)).softmax(1)
    assert torch.isfinite(probabilities).all()
    assert FOLDERS["audio"].labels()[int(probabilities.argmax())] == "_silence_"
