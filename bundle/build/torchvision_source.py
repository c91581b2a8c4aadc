"""A classifier of torchvision's registry, by name: its module, its labels, the geometry of its images.

Weights are downloaded when the module is loaded, and for nothing else.
"""

import difflib
import http.client
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from bundle.catalog import TorchvisionSource
from bundle.errors import BundleError

MIRROR = "WEIGHTS_MIRROR"  # environment variable: the URL of a directory that holds the weights' files


def load(source: TorchvisionSource) -> tuple[nn.Module, ImageClassification]:
    """The pretrained module in evaluation mode on the CPU, and the preset that its images went through.

    Module: float32 [N, 3, H, W], normalised -> logits float32 [N, classes], or a tuple that starts with them.

    Raises:
        BundleError: no such model or weights; the weights cannot be downloaded, or cannot be read.
    """
    weights = find_weights(source)
    file = fetch(weights.url)
    # the builder alone knows what these weights need of the architecture (auxiliary heads, image size, renamed
    # keys), and it reads the file that `fetch` has left in torch.hub's cache
    options = {"quantize": True} if "backend" in weights.meta else {}
    try:
        module = models.get_model(source.name, weights=weights, progress=False, **options)
    except RuntimeError as exc:
        raise BundleError(f"{file} does not fit {source.name}. Delete it and try again.", str(exc)) from exc
    return module.eval(), weights.transforms()


def labels(source: TorchvisionSource) -> list[str]:
    """The names of the classes, by class index."""
    return list(find_weights(source).meta["categories"])


def handler_settings(source: TorchvisionSource) -> dict:
    """The preset's geometry, as the `handler:` section of an `image_topk` model names it."""
    preset = find_weights(source).transforms()
    return {
        "resize": preset.resize_size[0],
        "crop": preset.crop_size[0],
        "interpolation": preset.interpolation.value,
    }


def find_weights(source: TorchvisionSource) -> models.WeightsEnum:
    """The entry of torchvision's registry.

    Raises:
        BundleError: there is none of this name, or it is no image classifier.
    """
    if source.name not in models.list_models():
        raise BundleError(f"torchvision has no model {source.name!r}{suggest(source.name, models.list_models())}")
    entries = models.get_model_weights(source.name).__members__
    if source.weights not in entries:
        raise BundleError(f"{source.name} has no weights {source.weights!r}; there are: {', '.join(entries)}.")
    weights = entries[source.weights]
    if not isinstance(weights.transforms(), ImageClassification) or not weights.meta["categories"]:
        raise BundleError(f"torchvision's {source.name} is no image classifier with weights {weights.name}.")
    return weights


def suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
    return f"; close to it: {', '.join(close)}." if close else ". See torchvision.models.list_models()."


def fetch(url: str) -> Path:
    """Downloads a weights file into torch.hub's cache, unless it is there, and checks that it holds only tensors.

    Returns:
        its path, which is where torchvision's builders look for it.

    Raises:
        BundleError: it cannot be downloaded (no network, not found, the hash in its name is not its own), or not read.
    """
    name = url.rsplit("/", 1)[1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if mirror := os.environ.get(MIRROR):
        url = f"{mirror.rstrip('/')}/{name}"
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True, progress=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as exc:
        if file.exists():
            raise BundleError(f"{file} is not a readable weights file. Delete it and try again.", str(exc)) from exc
        raise BundleError(
            f"{url} could not be downloaded: {exc}. Connect to the network, or set {MIRROR} to the URL of a directory "
            f"that has the file, or put the file there yourself: {file}"
        ) from exc
    return file
