"""Makes the model of the photographs: a ResNet-18 with weights of its own, whose answers depend on the picture.

    python -m loadtest.bench.resnet

No weights are downloaded. The convolutions are torchvision's random initialisation with a fixed seed. What makes the
answers depend on the picture is fitted on scenes that `inputs.py` draws:

- the statistics of each batch normalisation are those of the scenes, so that signals keep their size on their way;
- the last layer is a ridge regression on the whitened features, which tells the 20 kinds of scenes apart. The other 980
  classes are there because ImageNet's models have 1,000 outputs; they never win.

A new picture of a known kind is then recognised with a probability near 1, far from where a rounding error or
another decoder of JPEG could turn the answer.
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
from loadtest.bench.inputs import KINDS, made, scene

NAME = "resnet18"
STORE = paths.WORK / "store"
WEIGHTS, TORCHSCRIPT, LABELS = "weights.safetensors", "model.pt", "labels.json"  # what `fit` writes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
CLASSES = 1000
VARIATIONS = 24  # scenes of each kind that the model is fitted on
EXAMPLES = 22  # further ones, on which int8 is calibrated and compared
SETTINGS = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 8, "maxBatchDelay": 2}
SIDE = 224
RIDGE = 0.1  # of the features' mean variance
SHARPNESS = 24.0  # logits between a kind that is recognised and the others
NEVER = -2.0  # before sharpening: what the classes get that no scene belongs to


def build() -> nn.Module:
    """The fitted model, on the CPU, in evaluation mode: normalised float32 [N, 3, 224, 224] -> logits [N, 1000]."""
    model = resnet18(weights=None)
    model.load_state_dict(load_file(fitted(WEIGHTS)))
    return model.eval()


def make() -> None:
    """Fits the model and makes its folder as a user would, each where it is not there yet."""
    if not fitted(WEIGHTS).is_file():
        fit()
    if not folder().is_dir():
        add()


def fit() -> None:
    """Writes the weights, and the same model with its labels as a user of the bundle would bring it."""
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
    with replacing(fitted(WEIGHTS)) as partial:  # last and whole: the file says that all is there
        save_file(model.state_dict(), partial)


def add() -> None:
    """`make add-model NAME=resnet18 SERIALIZED=model.pt LABELS=labels.json SAMPLE=photo.jpg`, in folders of its own;
    then examples for int8, and settings for a model that has the machine to itself.
    """
    from bundle.build.add_model import NewModel, add_model  # what the peers need not import
    from bundle.catalog import CONFIG_NAME

    folder().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".add-", dir=paths.made()) as temporary:
        place = Path(temporary)
        image = made("photo.jpg")
        # the archive that it makes knows nothing of the examples: it goes with the temporary folder
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
        (place / NAME).rename(folder())  # last and whole: the folder says that all is there


def scenes() -> tuple[Tensor, Tensor]:
    """Normalised float32 [N, 3, 224, 224] and their kinds, int64 [N]."""
    kinds = [kind for kind in range(KINDS) for _ in range(VARIATIONS)]
    images = [
        numpy.asarray(scene(kind, index % VARIATIONS, SIDE * 2, SIDE * 2).resize((SIDE, SIDE)))
        for index, kind in enumerate(track(kinds, "draw scenes", transient=True))
    ]
    pixels = torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor(kinds)


def calibrate(model: nn.Module, pictures: Tensor) -> None:
    """Sets the batch normalisations' statistics to those of the pictures, and the model to evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    shuffled = pictures[torch.randperm(len(pictures))]
    with torch.inference_mode():
        for batch in track(shuffled.split(32), "calibrate", transient=True):
            model(batch)
    model.eval()


def features_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """-> float32 [N, 512]: what the last layer sees."""
    head, model.fc = model.fc, nn.Identity()
    try:
        return model(pictures)
    finally:
        model.fc = head


def ridge(features: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's weight [1000, 512] and bias [1000]: features [N, 512] -> SHARPNESS for their kind, 0 for others.

    Ridge regression on centred features whitens them by itself: it divides by their covariance.
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
    return paths.made() / NAME / name


def folder() -> Path:
    return paths.made() / "models" / NAME


if __name__ == "__main__":
    make()
    print(f"{fitted(WEIGHTS)} and {folder()} are there")
