"""Take a classifier from torchvision's registry, by name: its module, its labels and the sizes of its images.

Only `load` downloads the weights.
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

MIRROR = "WEIGHTS_MIRROR"  # environment variable: URL of a directory with the files of weights


def load(source: TorchvisionSource) -> tuple[nn.Module, ImageClassification]:
    """Return the pretrained module, in evaluation mode on the CPU, and the preset of its images.

    The module takes normalised images, float32 [N, 3, H, W], and returns logits, float32 [N, classes], or a tuple that
    starts with them.

    Raises:
        BundleError: there is no such model, or no such weights; they cannot be downloaded or read.
    """
    weights = find_weights(source)
    file = fetch(weights.url)
    # torchvision's builder, because it adapts the architecture to the weights (auxiliary heads, image size, renamed
    # keys); it reads the file that `fetch` has put into torch.hub's cache
    options = {"quantize": True} if "backend" in weights.meta else {}
    try:
        module = models.get_model(source.name, weights=weights, progress=False, **options)
    except RuntimeError as exc:
        raise BundleError(f"{file} does not fit {source.name}. Delete it and retry.", str(exc)) from exc
    return module.eval(), weights.transforms()


def labels(source: TorchvisionSource) -> list[str]:
    """Return the names of the classes, by class index."""
    return list(find_weights(source).meta["categories"])


def handler_settings(source: TorchvisionSource) -> dict:
    """Return the sizes and the interpolation of the preset, as settings of the handler `image_topk`."""
    preset = find_weights(source).transforms()
    return {
        "resize": preset.resize_size[0],
        "crop": preset.crop_size[0],
        "interpolation": preset.interpolation.value,
    }


def find_weights(source: TorchvisionSource) -> models.WeightsEnum:
    """Return the weights' entry in torchvision's registry.

    Raises:
        BundleError: there is no such model, or no such weights, or the model is not an image classifier.
    """
    if source.name not in models.list_models():
        raise BundleError(f"torchvision has no model {source.name!r}{suggest(source.name, models.list_models())}")
    entries = models.get_model_weights(source.name).__members__
    if source.weights not in entries:
        raise BundleError(f"{source.name} has no weights {source.weights!r}; there are: {', '.join(entries)}.")
    weights = entries[source.weights]
    if not isinstance(weights.transforms(), ImageClassification) or not weights.meta["categories"]:
        raise BundleError(f"torchvision's {source.name} is not an image classifier with the weights {weights.name}.")
    return weights


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that lists the known names that are similar."""
    close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
    return f"; similar names: {', '.join(close)}." if close else ". See torchvision.models.list_models()."


def fetch(url: str) -> Path:
    """Download a weights file into torch.hub's cache, if it is not there, and check that it has only tensors.

    Returns:
        its path, where torchvision's builders look for it.

    Raises:
        BundleError: the file cannot be downloaded (no network, not found, a hash that its name does not have), or
            cannot be read.
    """
    name = url.rsplit("/", 1)[1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if mirror := os.environ.get(MIRROR):
        url = f"{mirror.rstrip('/')}/{name}"
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True, progress=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, http.client.HTTPException) as exc:
        if file.exists():
            raise BundleError(f"{file} is not a readable weights file. Delete it and retry.", str(exc)) from exc
        raise BundleError(
            f"Cannot download {url}: {exc}. Connect to the network, set {MIRROR} to the URL of a directory that has "
            f"the file, or copy the file to {file}."
        ) from exc
    return file
