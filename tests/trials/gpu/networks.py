"""Common large networks, with random weights: nothing is downloaded, and their speed is that of trained ones."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torchvision import models

from bundle.catalog import CONFIG_NAME, LABELS_NAME
from loadtest.bench.cases import Case
from loadtest.bench.resnet import CLASSES, MEAN, STD

NAMES = ("resnet50", "vit_b_16")  # of torchvision's builders
# Length after which weights repeat: an archive of random ones takes minutes to compress. A prime, so that rows differ.
PERIOD = 4093
SERVED = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1}


@dataclass(frozen=True)
class Network(Case):
    """A case of the benchmark whose model folder is made here."""

    place: Path = Path()

    @property
    def folder(self) -> Path:  # type: ignore[override]
        return self.place / self.model


def network(name: str, place: Path) -> Network:
    """Return the case of a network: photographs, resized to 224 x 224. Its model folder is made the first time."""
    folder = place / name
    if not (folder / CONFIG_NAME).exists():
        make(name, folder)
    return Network(name, name, "photo.jpg", "image/jpeg", (), place)


def make(name: str, folder: Path) -> None:
    """Write the model folder, as a user's who has a TorchScript file. Its settings come last, and mark it complete."""
    torch.manual_seed(0)
    module = models.get_model(name, weights=None).eval()
    if name.startswith("vit"):
        nn.init.normal_(module.heads.head.weight, std=0.02)  # zeros would make all answers equal
    for parameter in module.parameters():
        values = parameter.data.flatten()
        repeated = values[:PERIOD].repeat(-(-len(values) // PERIOD))
        parameter.data = repeated[: len(values)].view_as(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.script(module).save(folder / "network.pt")
    labels = {str(index): f"class {index}" for index in range(CLASSES)}
    (folder / LABELS_NAME).write_text(json.dumps(labels))
    source = {"file": "network.pt", "mean": list(MEAN), "std": list(STD)}
    config = {**SERVED, "bundle": {"version": "1.0", "handler": "image_topk", "serialized": source}}
    (folder / CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False))
