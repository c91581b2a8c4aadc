"""Generate the model for photographs: a ResNet-18 that classifies the scenes of `inputs.py`.

    python -m loadtest.bench.resnet

No weights are downloaded. The convolutions have torchvision's random initialisation with a fixed seed. Two parts are
fitted on scenes:

- The batch normalisations have the statistics of the scenes, so that activations keep their scale from layer to layer.
- The last layer is a ridge regression on the features, which separates the 20 kinds of scene. The other 980 classes
  exist because ImageNet's models have 1,000 outputs; they never rank first.

The model recognises a new scene of a known kind with a probability near 1. Rounding errors or another JPEG decoder do
not change that answer.
"""

import json
import tempfile
import warnings
from pathlib import Path

import numpy
import torch
import yaml
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import resnet18

from bundle.files import replacing
from loadtest.bench import paths
from loadtest.bench.inputs import KINDS, generated, scene

NAME = "resnet18"
STORE = paths.WORK / "store"
WEIGHTS, TORCHSCRIPT, LABELS = "weights.safetensors", "model.pt", "labels.json"  # the files that `fit` writes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
CLASSES = 1000
VARIATIONS = 24  # scenes of each kind for fitting the model
EXAMPLES = 22  # other scenes of each kind, for calibrating and checking int8
SETTINGS = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 2}
SIDE = 224
RIDGE = 0.1  # the penalty, as a share of the features' mean variance
SHARPNESS = 24.0  # difference in logits between the recognised kind and the others
NEVER = -2.0  # logit, before sharpening, of the classes without scenes


def build() -> nn.Module:
    """Return the fitted model in evaluation mode: normalised float32 [N, 3, 224, 224] -> logits [N, 1000]."""
    model = resnet18(weights=None)
    model.load_state_dict(load_file(fitted(WEIGHTS)))
    return model.eval()


def make() -> None:
    """Fit the model and add its folder, as a user would; skip what exists."""
    if not fitted(WEIGHTS).is_file():
        fit()
    if not folder().is_dir():
        add()


def fit() -> None:
    """Fit the model, and write its weights and the TorchScript and label files that a user would bring."""
    torch.manual_seed(0)
    model = resnet18(weights=None)
    pictures, kinds = scenes()
    calibrate(model, pictures)
    with torch.inference_mode():
        features = torch.cat([features_of(model, batch) for batch in pictures.split(32)])
    weight, bias = ridge(features, kinds)
    with torch.no_grad():
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(bias)
    fitted(LABELS).parent.mkdir(parents=True, exist_ok=True)
    labels = [f"scene {kind}" if kind < KINDS else f"class {kind}" for kind in range(CLASSES)]
    fitted(LABELS).write_text(json.dumps(labels))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.script(model).save(fitted(TORCHSCRIPT))
    with replacing(fitted(WEIGHTS)) as partial:  # last and atomically: this file marks the rest as complete
        save_file(model.state_dict(), partial)


def add() -> None:
    """Add the model's folder as `make add-model` does, then examples for int8 and settings for a machine of its own."""
    from bundle.build.add_model import NewModel, add_model  # not at the top: the peers do not need the bundle
    from bundle.catalog import CONFIG_NAME

    folder().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".add-", dir=paths.generated()) as temporary:
        place = Path(temporary)
        image = generated("photo.jpg")
        # the archive is built without the examples, so it is discarded with the temporary folder
        new = NewModel(NAME, fitted(TORCHSCRIPT), fitted(LABELS), sample=image)
        add_model(new, models_dir=place, store=place / ".store")
        examples = place / NAME / "examples"
        examples.mkdir()
        for index in track(range(KINDS * EXAMPLES), "draw examples", transient=True):
            picture = scene(index % KINDS, VARIATIONS + index // KINDS, SIDE * 2, SIDE * 2)
            picture.save(examples / f"{index}.jpg", quality=90)
        file = place / NAME / CONFIG_NAME
        config = yaml.safe_load(file.read_text()) | SETTINGS
        config["bundle"] |= {"examples": examples.name, "int8": True}
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        (place / NAME).rename(folder())  # last and atomically: this folder marks the model as complete


def scenes() -> tuple[Tensor, Tensor]:
    """Draw the scenes for fitting: normalised float32 [N, 3, 224, 224], and their kinds, int64 [N]."""
    kinds = [kind for kind in range(KINDS) for _ in range(VARIATIONS)]
    images = [
        numpy.asarray(scene(kind, index % VARIATIONS, SIDE * 2, SIDE * 2).resize((SIDE, SIDE)))
        for index, kind in enumerate(track(kinds, "draw scenes", transient=True))
    ]
    pixels = torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor(kinds)


def calibrate(model: nn.Module, pictures: Tensor) -> None:
    """Give the batch normalisations the statistics of the pictures, and set the model to evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    shuffled = pictures[torch.randperm(len(pictures))]
    with torch.inference_mode():
        for batch in track(shuffled.split(32), "calibrate", transient=True):
            model(batch)
    model.eval()


def features_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the inputs of the last layer, float32 [N, 512]."""
    head, model.fc = model.fc, nn.Identity()
    try:
        return model(pictures)
    finally:
        model.fc = head


def ridge(features: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the last layer: features [N, 512] -> the logit SHARPNESS for their kind, 0 for other kinds.

    Ridge regression divides by the covariance of the centred features, which whitens them.

    Returns:
        the weight [1000, 512] and the bias [1000].
    """
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    targets = nn.functional.one_hot(kinds, KINDS).double()
    covariance = centred.T @ centred
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
    known = torch.linalg.solve(covariance, centred.T @ (targets - targets.mean(0))).T
    weight, bias = torch.zeros(CLASSES, len(mean)), torch.full((CLASSES,), NEVER)
    weight[:KINDS] = known
    bias[:KINDS] = targets.mean(0) - known @ mean
    return weight * SHARPNESS, bias * SHARPNESS


def fitted(name: str) -> Path:
    return paths.generated() / NAME / name


def folder() -> Path:
    return paths.generated() / "models" / NAME


if __name__ == "__main__":
    make()
    print(f"Generated: {fitted(WEIGHTS)}, {folder()}")
