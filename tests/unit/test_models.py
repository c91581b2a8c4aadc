"""The four models that ship: accurate enough, small enough for git, and unchanged by the export."""

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


def test_shipped_models_are_served_by_default():
    assert set(FOLDERS) <= {folder.name for folder in select([])}


@pytest.mark.slow
def test_models_build_without_the_training_libraries():
    """`make setup` does not install them."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('lightning', 'torchmetrics', 'kornia')))\n"
    code = hidden + "\n".join(f"import models.{model}.model as m; m.build()" for model in PROMISED)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("model", PROMISED)
def test_recorded_accuracy_is_of_the_whole_test_set_and_high_enough(model):
    """The training run recorded it. With the data set, `test_served_accuracy.py` measures it again."""
    measured = metrics(model)
    assert measured["accuracy"] >= PROMISED[model]
    assert sum(map(sum, measured["confusion_matrix"])) == measured["data"]["test"] == TEST_INPUTS[model]
    module, _ = load(FOLDERS[model], load_handler(FOLDERS[model]))
    assert measured["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert re.fullmatch("[0-9a-f]{40}", measured["commit"]), "the code that trained it was not committed"


@pytest.mark.parametrize("model", PROMISED)
def test_recorded_metrics_agree_with_the_confusion_matrix(model):
    measured = metrics(model)
    matrix = torch.tensor(measured["confusion_matrix"], dtype=torch.float64)
    correct = matrix.diagonal()
    f1 = 2 * correct / (matrix.sum(0) + matrix.sum(1)).clamp(min=1)
    assert (correct.sum() / matrix.sum()).item() == pytest.approx(measured["accuracy"], abs=1e-4)
    assert f1.mean().item() == pytest.approx(measured["macro_f1"], abs=1e-3)


def test_recorded_recall_of_out_of_scope_text_is_high_enough():
    assert metrics("text")["oos_recall_at_95_kept"] >= 0.75


@pytest.mark.parametrize("model", PROMISED)
def test_weights_are_small_and_outputs_match_the_labels(model):
    folder = FOLDERS[model]
    assert (folder.path / "weights.safetensors").stat().st_size < 6_000_000
    module, [inputs, *_] = load(folder, load_handler(folder))
    with torch.inference_mode():
        assert module(*inputs).shape == (1, len(folder.labels()))
    assert folder.bundle.expect in folder.labels()


@pytest.mark.slow
@pytest.mark.parametrize("model", PROMISED)
def test_exported_module_computes_the_same_as_the_eager_one(model, tmp_path):
    """Compare other inputs and batch sizes than `export` itself does."""
    export(FOLDERS[model], load_handler(FOLDERS[model]), tmp_path / "model.pt")
    exported = torch.jit.load(tmp_path / "model.pt")
    module = importlib.import_module(f"models.{model}.model")
    eager = module.build()
    with torch.inference_mode():
        for size in (2, 5):
            inputs = module.example_inputs(size)
            torch.testing.assert_close(exported(*inputs), eager(*inputs), rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_the_scores_of_intents():
    module = importlib.import_module("models.text.model")
    eager = module.build()
    ids, mask = module.example_inputs(4)
    padded = torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(mask, (0, 9))
    with torch.inference_mode():
        torch.testing.assert_close(eager(*padded), eager(ids, mask), rtol=1e-4, atol=1e-4)


def test_intents_get_the_same_scores_in_training_as_in_evaluation():
    module = importlib.import_module("models.text.model")
    model = module.build()
    inputs = module.example_inputs(4)
    evaluated = model(*inputs)
    for member in model.intents.members:
        member.train()
        member.drop_features.p = member.drop.p = 0.0
    torch.testing.assert_close(model(*inputs), evaluated, rtol=1e-4, atol=1e-4)


def test_digital_silence_is_classified_as_silence():
    module = importlib.import_module("models.audio.model")
    with torch.inference_mode():
        probabilities = module.build()(torch.zeros(1, 16000)).softmax(1)
    assert torch.isfinite(probabilities).all()
    assert FOLDERS["audio"].labels()[int(probabilities.argmax())] == "_silence_"
