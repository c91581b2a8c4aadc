"""Masks of classes: tiles of a large image, their blending, and the answer.

A mask is uint8 [H, W], a class index for each pixel.
"""

import base64
import io
import math
from collections.abc import Iterator

import numpy
import torch
from PIL import Image
from torch import Tensor

from handlers.core.errors import NonFiniteOutput

MAX_CLASSES = 256  # of an indexed PNG
BACKGROUND = ("background", "__background__")  # labels whose pixels an overlay leaves unchanged
OPACITY = 0.5


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side of at least `tile` pixels: evenly spaced, overlapping by `overlap` or more.

    >>> starts(1000, 512, 64)
    [0, 244, 488]
    """
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    return [round(index * (length - tile) / max(1, count - 1)) for index in range(count)]


def corners(size: torch.Size, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield the top and left of every tile of an image [..., H, W]."""
    for top in starts(size[-2], tile, overlap):
        for left in starts(size[-1], tile, overlap):
            yield top, left


def pad(pixels: numpy.ndarray, tile: int) -> numpy.ndarray:
    """Mirror an image, [H, W] or [H, W, C], at the right and at the bottom, until no side is shorter than `tile`."""
    missing = [(0, max(0, tile - side)) for side in pixels.shape[:2]]
    if not any(after for _, after in missing):
        return pixels
    return numpy.pad(pixels, [*missing, *[(0, 0)] * (pixels.ndim - 2)], mode="symmetric")


def window(tile: int, overlap: int, device: torch.device) -> Tensor:
    """Return the weight of each pixel of a tile, [tile, tile]: it rises over the overlap, from every edge."""
    edge = torch.arange(tile, device=device) + 0.5
    ramp = torch.minimum(edge, edge.flip(0)).clamp(max=max(overlap, 0.5))
    ramp = ramp / ramp.max()
    return ramp[:, None] * ramp


class Blend:
    """Blend the scores of one image's tiles on the device, and choose the best class of each pixel.

    Args:
        size: the image's height and width, at the model's scale.
        weights: of a tile's pixels, as `window` makes them.
    """

    def __init__(self, size: torch.Size, weights: Tensor):
        self.size, self.weights = size, weights
        self.sum: Tensor | None = None

    def add(self, scores: Tensor, top: int, left: int) -> None:
        """Add the scores of one tile, [classes, tile, tile]. The first tile decides the number of classes.

        Raises:
            ValueError: the scores have another size than the tile.
        """
        if scores.shape[1:] != self.weights.shape:
            sizes = " x ".join(map(str, scores.shape[1:])), " x ".join(map(str, self.weights.shape))
            raise ValueError(f"the model returns scores of {sizes[0]} pixels for a tile of {sizes[1]}: correct `tile`")
        if self.sum is None:
            self.sum = torch.zeros(len(scores), *self.size, device=scores.device)
        height, width = self.weights.shape
        self.sum[:, top : top + height, left : left + width].addcmul_(scores.float(), self.weights)

    def mask(self) -> Tensor:
        """Return the mask on the host.

        The sum is not divided by the sum of the weights, because that would not change which class is best.

        Raises:
            NonFiniteOutput: a score is not finite.
        """
        assert self.sum is not None, "an image has at least one tile"
        if not all(extreme.isfinite() for extreme in self.sum.aminmax()):
            raise NonFiniteOutput("The model's output for this input is not a finite number.")
        return self.sum.max(0).indices.byte().cpu()  # argmax takes ten times as long on a CPU


def shares(mask: Image.Image, labels: list[str]) -> list[dict]:
    """Return the classes that occur in a mask, the largest first: label, class, share of the pixels, pixels."""
    counts = mask.histogram()
    found = sorted(
        ((count, index) for index, count in enumerate(counts) if count), key=lambda pair: (-pair[0], pair[1])
    )
    total = mask.width * mask.height
    return [
        {"label": labels[index], "class": index, "share": round(count / total, 6), "pixels": count}
        for count, index in found
    ]


def colours() -> list[int]:
    """Return the 256 colours of PASCAL VOC's masks, as red, green, blue, red, ...: class 0 is black."""
    palette = numpy.zeros((256, 3), numpy.uint8)
    index = numpy.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(numpy.uint8)
    return palette.flatten().tolist()


def coloured(mask: Image.Image) -> Image.Image:
    """Return the mask, mode "L", as an indexed image, mode "P", whose values are the class indices."""
    image = mask.copy()
    image.putpalette(colours())
    return image


def overlay(image: Image.Image, mask: Image.Image, labels: list[str]) -> Image.Image:
    """Lay the colours of a mask over an "RGB" image of the same size. The background keeps its own colours."""
    shown = mask.point([0 if label in BACKGROUND else 255 for label in labels] + [0] * (256 - len(labels)))
    mixed = Image.blend(image, coloured(mask).convert("RGB"), OPACITY)
    return Image.composite(mixed, image, shown)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def base64_png(mask: Image.Image) -> str:
    return base64.b64encode(png(coloured(mask))).decode()
