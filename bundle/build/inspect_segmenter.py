"""Find out what a segmenter takes and returns."""

import math

import torch
from torch import Tensor

from bundle.build.export import PreprocessedImages
from bundle.build.inspect_model import (
    USUAL,
    Found,
    Report,
    check_finite,
    describe_images,
    examine,
    find_images,
    normalisations,
    random_batch,
    words,
)
from bundle.build.new_model import NewModel
from bundle.errors import BundleError

SIDES = (512, 520, 256, 224, 320, 384, 448, 480, 640, 1024, 192, 160, 128, 96, 64, 32)  # pixels, in the order tried
OVERLAP = 64  # pixels of two tiles
MAX_PIXELS = 7_000_000  # of an image at the model's scale, as the default settings of the handler allow


def inspect_segmenter(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the size of a segmenter's tiles, and its classes.

    Raises:
        BundleError: it does not return a score for each class and pixel.
    """
    known = normalisations(USUAL, new.mean, new.std)
    images, _ = find_images(model, (new.size,) if new.size else SIDES, known, scores_of)
    # a model of one size was trained on images that were resized to it; others, on images or crops of any size
    resize = new.resize or (None if images.any_side else images.side)
    scale = f"resized to {resize} pixels on the shorter side (RESIZE)" if resize else "not resized (RESIZE)"
    for line in describe_images(images, f"images are {scale}, then cut into tiles of this size"):
        report(line)
    module = PreprocessedImages(model, images.mean, images.std)
    outputs = examine(module, random_batch(images), lambda out, size: scores_of(out, images.side, size), report)
    classes = outputs.shape[1]
    report(f"returns {classes} classes for each pixel")
    overlap = min(OVERLAP, images.side // 4)
    settings: dict[str, tuple[object, str]] = {
        "tile": (images.side, "pixels of the side of the model's input"),
        "overlap": (overlap, "least overlap of two tiles, in pixels"),
        "max_tiles": (math.ceil(MAX_PIXELS / (images.side - overlap) ** 2), "of one image"),
        "channels": (images.channels, "3: RGB, 1: grey"),
    }
    if resize:
        settings["resize"] = (resize, "pixels of the shorter side")
    return Found(classes, settings, images, batch_size=4)


def scores_of(output: object, side: int, size: int = 1) -> Tensor:
    """Return a segmenter's output as float32 [size, classes, side, side].

    Raises:
        BundleError: the output has another type or shape, or numbers that are not finite.
    """
    main = output[0] if isinstance(output, tuple) else output
    if isinstance(main, dict) and "out" in main:
        main = main["out"]
    shown = f"The model returns {words(main)} for {size} images of {side} x {side} pixels."
    if not isinstance(main, Tensor) or not main.is_floating_point() or main.ndim != 4 or len(main) != size:
        raise BundleError(
            f"{shown} A segmenter must return floating-point numbers [N, classes, H, W], or a dict with them as `out`. "
            "Wrap the model in a module that does, and script the module."
        )
    if main.shape[1] == 1:
        raise BundleError(
            f"{shown} A mask of one class needs two, the background first: return torch.cat([-logits, logits], 1)."
        )
    if main.shape[2:] != (side, side):
        raise BundleError(
            f"{shown} It must return one score for each pixel: enlarge the scores inside the module, with "
            "torch.nn.functional.interpolate(scores, size=images.shape[-2:], mode='bilinear')."
        )
    return check_finite(main)
