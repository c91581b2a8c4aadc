"""Explain the answers to images: a score per pixel of the model's input."""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from handlers.core.explain import Explainable
from handlers.core.images import WHOLE, ImageLimits, Shares, flatten, open_image, upright_size
from handlers.core.slots import Sample

CELLS = 7  # squares along a side that are removed together: single pixels are too many, and say little alone
MOST_SCORES = 256  # along a side of an answer; of a larger input, a score is the sum of a few neighbouring pixels


def explainable_image(
    sample: Sample, baseline: Tensor, limits: ImageLimits, field: str = "data", cells: int = CELLS
) -> Explainable:
    """Return an image as something to explain.

    Args:
        sample: its tensors are pixels, [C, H, W]. Its info is the place of these pixels in the original: left, top,
            right and bottom, in shares of the upright image's sides.
        baseline: the image without content, float32 [C, H, W].
        limits: with which the image was decoded.
        field: of `sample.inputs`, with the image's file.
        cells: squares along the longer side.
    """
    assert isinstance(sample.tensors, Tensor)
    pixels = sample.tensors.float()
    channels, height, width = pixels.shape
    cell = -(-max(height, width) // cells)
    block = -(-max(height, width) // MOST_SCORES)
    columns = -(-width // cell)
    squares = (torch.arange(height) // cell)[:, None] * columns + torch.arange(width) // cell
    place = cast("Shares | None", sample.info)
    places = list(zip(place or WHOLE, ("width", "height") * 2, strict=True))

    def describe(attributions: Tensor) -> dict:
        sides = dict(zip(("width", "height"), upright_size(getattr(sample.inputs, field), limits), strict=True))
        rows = in_blocks(attributions.sum(0), block).tolist()
        return {
            "attributions": [[float(f"{value:.4g}") for value in row] for row in rows],
            "crop": [round(share * sides[side], 2) for share, side in places],
            "image": sides,
        }

    def draw(attributions: Tensor, caption: str, box: list[float] | None = None) -> bytes:
        from handlers.core import drawing  # imports Matplotlib's font, which predictions do not need

        outline = None
        if box:
            sides = upright_size(getattr(sample.inputs, field), limits)
            outline = [at / side for at, side in zip(box, sides * 2, strict=True)]
        image = flatten(open_image(getattr(sample.inputs, field), limits, enough=drawing.MAX_SIDE))
        return drawing.heat_map(image, [share for share, _ in places], attributions.sum(0).numpy(), caption, outline)

    return Explainable(
        inputs=(pixels[None],),
        baselines=(baseline[None],),
        groups=(squares.expand(1, channels, height, width).contiguous(),),
        arguments=lambda images: (images,),
        describe=describe,
        draw=draw,
        windows=((channels, 2 * cell, 2 * cell),),
    )


def in_blocks(scores: Tensor, block: int) -> Tensor:
    """Add up the scores of blocks of pixels, [H, W] -> [H / block, W / block], rounded up."""
    if block == 1:
        return scores
    height, width = scores.shape
    padded = pad(scores, (0, -width % block, 0, -height % block))
    return avg_pool2d(padded[None], block)[0] * block**2
