"""Take a classifier, detector or segmenter from torchvision's registry, by name: its module, labels and image sizes.

The preset of the weights says which of the three a model is. Only `load` downloads the weights.
"""

import difflib
import http.client
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification, ObjectDetection, SemanticSegmentation

from bundle.catalog import TorchvisionSource
from bundle.errors import BundleError

MIRROR = "WEIGHTS_MIRROR"  # environment variable: URL of a directory with the files of weights
HANDLERS = {ImageClassification: "image_topk", ObjectDetection: "detection", SemanticSegmentation: "segmentation"}

Preset: TypeAlias = ImageClassification | ObjectDetection | SemanticSegmentation


class ListedImages(nn.Module):
    """A detector that takes a batch: torchvision's own take a list of images, as float32 in [0, 1].

    Args:
        has_losses: whether the scripted detector returns a tuple of losses and detections, as torchvision's do.
    """

    has_losses: Final[bool]

    def __init__(self, detector: nn.Module, has_losses: bool = True):
        super().__init__()
        self.detector = detector
        self.has_losses = has_losses

    def forward(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Detect objects.

        Args:
            images: uint8 [N, 3, H, W], padded at the right and at the bottom.
            sizes: int64 [N, 2], height and width of each image in pixels, without the padding.

        Returns:
            for each image, "boxes" float32 [K, 4] in pixels, "labels" int64 [K], "scores" float32 [K]; also "masks"
            float32 [K, 1, H, W], or "keypoints" float32 [K, P, 3] and "keypoints_scores" float32 [K, P].
        """
        listed: list[Tensor] = []
        for i in range(images.size(0)):
            height, width = int(sizes[i, 0]), int(sizes[i, 1])
            listed.append(images[i, :, :height, :width].float() / 255)
        if torch.jit.is_scripting():  # TorchScript compiles only the branches that it takes
            if self.has_losses:
                return self.detector(listed)[1]
            else:  # noqa: RET505
                return self.detector(listed)
        else:
            found = self.detector(listed)
            return found[1] if isinstance(found, tuple) else found


def load(source: TorchvisionSource) -> tuple[nn.Module, Preset]:
    """Return the pretrained module, in evaluation mode on the CPU, and the preset of its images.

    A classifier takes normalised images, float32 [N, 3, H, W], and returns logits, float32 [N, classes], or a tuple
    that starts with them. A segmenter takes the same, and returns {"out": logits, float32 [N, classes, H, W]}. A
    detector is a `ListedImages`, which normalises itself.

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
    preset = weights.transforms()
    if isinstance(preset, ObjectDetection):
        module = ListedImages(module)
    elif isinstance(preset, SemanticSegmentation):
        drop_auxiliary(module)
    return module.eval(), preset


def drop_auxiliary(segmenter: nn.Module) -> None:
    """Remove the auxiliary classifier, which only training needs, as torchvision builds a model without one."""
    if hasattr(segmenter, "aux_classifier"):
        del segmenter.aux_classifier  # TorchScript rejects None in place of a submodule
        segmenter.aux_classifier = None  # type: ignore[assignment]  # the type of a submodule


def labels(source: TorchvisionSource) -> list[str]:
    """Return the names of the classes, by class index."""
    return list(find_weights(source).meta["categories"])


def handler_settings(source: TorchvisionSource) -> dict:
    """Return the sizes and the interpolation of the preset, as settings of the handler; a detector resizes itself."""
    preset = find_weights(source).transforms()
    if isinstance(preset, ObjectDetection):
        return {}
    sizes = {"resize": preset.resize_size[0], "interpolation": preset.interpolation.value}
    return sizes if isinstance(preset, SemanticSegmentation) else sizes | {"crop": preset.crop_size[0]}


def find_weights(source: TorchvisionSource) -> models.WeightsEnum:
    """Return the weights' entry in torchvision's registry.

    Raises:
        BundleError: there is no such model, or no such weights, or the model is of another kind.
    """
    if source.name not in models.list_models():
        raise BundleError(f"torchvision has no model {source.name!r}{suggest(source.name, models.list_models())}")
    entries = models.get_model_weights(source.name).__members__
    if source.weights not in entries:
        raise BundleError(f"{source.name} has no weights {source.weights!r}; there are: {', '.join(entries)}.")
    weights = entries[source.weights]
    if not isinstance(weights.transforms(), tuple(HANDLERS)) or not weights.meta["categories"]:
        raise BundleError(
            f"torchvision's {source.name} with the weights {weights.name} cannot be served: it does not classify, "
            "detect or segment images."
        )
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
