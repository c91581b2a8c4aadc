"""Explain the answers to images: a score per pixel of the model's input."""

from typing import cast

import torch
from torch import Tensor

from handlers.core.explain import Explainable
from handlers.core.images import ImageLimits, flatten, open_image, upright_size
from handlers.core.slots import Sample

CELLS = 7  # squares along a side that are removed together: single pixels are too many, and say little alone


def explainable_image(sample: Sample, baseline: Tensor, limits: ImageLimits) -> Explainable:
    """Return an image as something to explain.

    Args:
        sample: its tensors are pixels, [C, H, W]. Its info is the place of these pixels in the original: left, top,
            right and bottom, in shares of the upright image's sides.
        baseline: the image without content, float32 [C, H, W].
        limits: with which the image was decoded.
    """
    assert isinstance(sample.tensors, Tensor)
    pixels = sample.tensors.float()
    channels, height, width = pixels.shape
    cell = -(-max(height, width) // CELLS)
    columns = -(-width // cell)
    squares = (torch.arange(height) // cell)[:, None] * columns + torch.arange(width) // cell
    place = cast("tuple[float, ...]", sample.info)
    places = list(zip(place or (0.0, 0.0, 1.0, 1.0), ("width", "height") * 2, strict=True))

    def describe(attributions: Tensor) -> dict:
        sides = dict(zip(("width", "height"), upright_size(sample.inputs.data, limits), strict=True))
        rows = attributions.sum(0).tolist()
        return {
            "attributions": [[float(f"{value:.4g}") for value in row] for row in rows],
            "crop": [round(share * sides[side], 2) for share, side in places],
            "image": sides,
        }

    def draw(attributions: Tensor, caption: str) -> bytes:
        from handlers.core import drawing  # imports Matplotlib's font, which predictions do not need

        image = flatten(open_image(sample.inputs.data, limits, enough=drawing.MAX_SIDE))
        return drawing.heat_map(image, [share for share, _ in places], attributions.sum(0).numpy(), caption)

    return Explainable(
        inputs=(pixels[None],),
        baselines=(baseline[None],),
        groups=(squares.expand(1, channels, height, width).contiguous(),),
        arguments=lambda images: (images,),
        describe=describe,
        draw=draw,
        windows=((channels, 2 * cell, 2 * cell),),
    )
