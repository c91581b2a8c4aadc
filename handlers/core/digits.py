"""Convert an image file of one handwritten digit to the form of MNIST's images."""

from collections.abc import Sequence

import numpy
import torch
from PIL import Image as PillowImage
from torch import Tensor

from handlers.core.errors import BlankImage
from handlers.core.images import WHOLE, ImageLimits, Shares, flatten, open_image

SIDE, BOX = 28, 20  # pixels; in MNIST a digit fits a box of 20 x 20, and its centre of mass is that of 28 x 28
WORKING_BOX = 4 * BOX  # pixels; the lowest resolution at which strokes are measured and thickened
MAX_SIDE = 512  # pixels; larger images are reduced, because they show no more of a digit
MIN_CONTRAST = 20  # of 255, between ink and background
FAINT, FIRM = 0.04, 0.2  # thresholds of ink, as a share of the strongest ink: in MNIST's images, and in all others
MIN_STROKE = 2.0  # pixels in the box of 20; MNIST's own strokes are 2 to 4

# [784, 3]; pixels @ MOMENTS = mass, and its first moments down and across. Sums of uint8 are exact in float32.
MOMENTS = numpy.stack([numpy.ones(SIDE**2), *numpy.indices((SIDE, SIDE)).reshape(2, -1)], axis=1, dtype=numpy.float32)


def read_digit(content: bytes, limits: ImageLimits) -> tuple[Tensor, Shares]:
    """Decode an image file into pixels as in MNIST.

    Returns:
        uint8 [1, 28, 28]; and their place in the image: left, top, right and bottom, in shares of its sides.

    Raises:
        UndecodableInput: the file is not an image, or the image is blank.
        ImageTooLarge: it exceeds a limit.
    """
    image = open_image(content, limits, enough=MAX_SIDE)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image = grey(image)
    if is_mnist(image):
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE), WHOLE
    canvas, (left, top, right, bottom) = to_mnist(numpy.asarray(image))
    place = left / image.width, top / image.height, right / image.width, bottom / image.height
    return torch.from_numpy(canvas).unsqueeze(0), place


def grey(image: PillowImage.Image) -> PillowImage.Image:
    """Convert to mode "L", with transparent pixels as a background that contrasts with the ink."""
    if image.mode == "RGBA":
        alpha = numpy.asarray(image.getchannel("A"), dtype=numpy.float32)
        ink = numpy.asarray(image.convert("L"), dtype=numpy.float32)
        bright = alpha.any() and numpy.average(ink, weights=alpha) > 127
        image = flatten(image, (0, 0, 0) if bright else (255, 255, 255))
    return image if image.mode == "L" else image.convert("L")


def is_mnist(image: PillowImage.Image) -> bool:
    """Return whether an image of mode "L" already has the form that `to_mnist` makes.

    Clients that have MNIST send such images; recognising them saves the work of `to_mnist`.
    """
    box = image.getbbox()
    if image.size != (SIDE, SIDE) or box is None:
        return False
    left, top, right, bottom = box
    size = bottom - top, right - left
    if max(size) != BOX or image.getextrema()[1] != 255:
        return False
    mass, down, across = (numpy.frombuffer(image.tobytes(), numpy.uint8).astype(numpy.float32) @ MOMENTS).tolist()
    return corner(((down - top * mass) / mass, (across - left * mass) / mass), size) == (top, left)


def to_mnist(pixels: numpy.ndarray) -> tuple[numpy.ndarray, tuple[float, ...]]:
    """Convert any image of a digit to the form of MNIST's images (LeCun et al. 1998, section III.A).

    This finds the background, makes the ink bright, crops to the ink, fits it into the box without distortion, and
    moves its centre of mass to the middle. An image of MNIST is returned unchanged.

    Args:
        pixels: uint8 [H, W], dark on light or light on dark.

    Returns:
        uint8 [28, 28], and its place in `pixels`: left, top, right and bottom, which may lie outside.

    Raises:
        BlankImage: the contrast with the background is too low.
    """
    ink, noise = separate_ink(pixels.astype(numpy.float32))
    peak = ink.max()
    if peak < max(MIN_CONTRAST, 2 * noise):
        raise BlankImage(
            "The image is blank: no digit stands out from the background. Send an image with more contrast."
        )
    ink = numpy.clip((ink - noise) / (peak - noise), 0, 1) if noise else ink / peak
    rows, columns = extent(ink, FAINT)
    digit = ink[rows, columns]
    margin = 0.0  # share of the digit by which it grew on each side
    if not BOX - 1 <= max(digit.shape) <= BOX:  # not an MNIST image: faint pixels are blur, noise, or JPEG artefacts
        rows, columns = extent(ink, FIRM)
        digit = ink[rows, columns]
        if max(digit.shape) < WORKING_BOX:
            digit = fit(digit, WORKING_BOX)
        thick = thicken(digit)
        margin = (max(thick.shape) - max(digit.shape)) / 2 / max(digit.shape)
        digit = fit(thick, BOX)
    canvas, (top, left) = centre((digit * (255 / digit.max())).round())
    longer = max(rows.stop - rows.start, columns.stop - columns.start)
    pixel = longer * (1 + 2 * margin) / max(digit.shape)  # of the canvas, in pixels of the original
    x, y = columns.start - margin * longer - left * pixel, rows.start - margin * longer - top * pixel
    return canvas, (x, y, x + SIDE * pixel, y + SIDE * pixel)


def extent(ink: numpy.ndarray, threshold: float) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest part of [H, W] that has all values above the threshold."""
    rows, columns = (numpy.flatnonzero(ink.max(axis=axis) > threshold) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def separate_ink(pixels: numpy.ndarray) -> tuple[numpy.ndarray, float]:
    """Subtract the background from float32 [H, W].

    The background is a plane fitted to the image's edges, so that a shadow across the paper does not count as ink.

    Returns:
        the ink, float32 [H, W], which is 0 on the background; and the noise of the background, in the same units.
    """
    height, width = pixels.shape
    depth = max(1, min(height, width) // 25)
    if not any(edge.any() for edge in (pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:])):
        return pixels, 0.0  # black edges, as in MNIST: no plane has to be fitted
    x, y = numpy.linspace(-1, 1, width), numpy.linspace(-1, 1, height)
    frame = numpy.ones_like(pixels, dtype=bool)
    frame[depth:-depth, depth:-depth] = False
    rows, columns = frame.nonzero()
    known, values = numpy.stack([x[columns], y[rows], numpy.ones(len(rows))], axis=1), pixels[frame]
    background = numpy.array([0, 0, numpy.median(values)])
    for _ in range(2):
        error = numpy.abs(values - known @ background)
        inlier = error <= max(3 * numpy.median(error), 1e-3)
        design = known[inlier]
        background = numpy.linalg.lstsq(design.T @ design, design.T @ values[inlier], rcond=None)[0]
    noise = 4 * float(numpy.median(numpy.abs(values - known @ background)))
    across, down = (background[0] * x).astype(numpy.float32), (background[1] * y + background[2]).astype(numpy.float32)
    difference = pixels - (across + down[:, None])
    bright, dark = numpy.clip(difference, 0, None), numpy.clip(-difference, 0, None)
    return (bright if bright.sum() > dark.sum() else dark), noise


def fit(ink: numpy.ndarray, box: int) -> numpy.ndarray:
    """Resize ink, float32 [H, W] in [0, 1], so that its longer side has `box` pixels."""
    height, width = ink.shape
    scale = box / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = PillowImage.fromarray(ink.astype(numpy.float32))
    resized = numpy.asarray(image.resize(size, PillowImage.Resampling.BICUBIC))
    return numpy.clip(resized, 0, 1)


def thicken(ink: numpy.ndarray) -> numpy.ndarray:
    """Widen strokes that would disappear in the box, such as those of a fine pen on a large sheet.

    The width of a stroke is its area divided by half the length of its outline.
    """
    mask = numpy.pad(ink > 0.5 * ink.max(), 1)
    inside = mask[1:-1, 1:-1]
    neighbours = mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    width = 2 * inside.sum() / max(1, (inside & ~neighbours).sum())
    missing = round((MIN_STROKE * max(ink.shape) / BOX - width) / 2)
    if missing <= 0:
        return ink
    widened = torch.from_numpy(numpy.pad(ink, missing))[None, None]
    for kernel in ((2 * missing + 1, 1), (1, 2 * missing + 1)):
        widened = torch.nn.functional.max_pool2d(widened, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    return widened[0, 0].numpy()


def centre(ink: numpy.ndarray) -> tuple[numpy.ndarray, tuple[int, int]]:
    """Place ink, [H, W] of at most 20 x 20, 0 to 255, in uint8 [28, 28], with its centre of mass in the middle.

    Returns:
        the canvas, and the top and left of the ink in it.
    """
    canvas = numpy.zeros((SIDE, SIDE), dtype=numpy.uint8)
    mass = ink.sum()
    middle = [(ink.sum(axis=1 - axis) @ numpy.arange(length)) / mass for axis, length in enumerate(ink.shape)]
    top, left = corner(middle, ink.shape)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas, (top, left)


def corner(middle: Sequence[float], size: Sequence[int]) -> tuple[int, int]:
    """Return the top and left at which a digit's centre of mass is in the middle of the canvas, or as near as possible.

    Args:
        middle: the centre of mass within the digit, down and across.
        size: of the digit, down and across.
    """
    top, left = (min(max(round(SIDE / 2 - at), 0), SIDE - length) for at, length in zip(middle, size, strict=True))
    return top, left
