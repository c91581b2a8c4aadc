"""Bytes of an image file -> an upright 8-bit Pillow image. Sizes are checked before a pixel is decoded."""

import io
import re
import struct
import warnings
from typing import Annotated

import numpy
from PIL import ExifTags, Image, ImageOps
from pydantic import BaseModel, Field

from handlers.core.errors import ImageTooLarge, UndecodableImage

# of broken metadata Pillow warns in words of its own for each file: Python would keep every one of them, and log it
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.init()
COMMON = ("JPEG", "PNG", "WEBP", "GIF")  # first, because Pillow tries one after the other
# EPS starts Ghostscript, and IPTC opens whatever is in it, EPS too; the others need programs or libraries that Pillow
# only stubs
FORMATS = (*COMMON, *sorted(set(Image.OPEN) - {*COMMON, "EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}))
LIBJPEG = ("JPEG", "MPO", "BLP")  # formats whose scans nobody else counts; libtiff stops at a hundred by itself
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG, of those that have a segment, and of its end
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

# what Pillow's decoders raise on broken files, as fuzzing all of them has shown
DECODE_ERRORS = (
    *(OSError, SyntaxError, EOFError, struct.error, RuntimeError),
    *(ValueError, OverflowError, IndexError, KeyError, TypeError, AttributeError),
)


class ImageLimits(BaseModel):
    max_pixels: Annotated[int, Field(gt=0)] = 50_000_000  # width x height; a 48-megapixel photograph passes
    # likewise, of what Pillow decodes in Python (QOI, PPM of other than 8 bits, DDS, ...), a microsecond a pixel
    max_slow_pixels: Annotated[int, Field(gt=0)] = 2_000_000
    max_scans: Annotated[int, Field(gt=0)] = 100  # of a JPEG: each goes over all pixels again, and may have 95 bytes
    min_side: Annotated[int, Field(gt=0)] = 8  # pixels


def open_image(content: bytes, settings: ImageLimits, enough: int | None = None) -> Image.Image:
    """Decodes the first frame, turned upright as its EXIF orientation says.

    Args:
        enough: pixels of the shorter side that will be used. A JPEG of at least twice as many is decoded at a half, a
            quarter or an eighth of its size (libjpeg's scaled inverse DCT), never at less than what is enough.

    Returns:
        an image of mode "L", "RGB" or "RGBA"; 16-bit and floating-point pixels are scaled to 8 bits.

    Raises:
        UndecodableImage: not an image, or a broken one, or one smaller than `min_side`.
        ImageTooLarge: more than `max_pixels`, `max_slow_pixels` or `max_scans`.
    """
    # Pillow's own limit, for the sizes that show late: of tiles, and of images inside of others (ICO, BLP)
    Image.MAX_IMAGE_PIXELS = settings.max_pixels
    too_large = f"The image is too large; at most {settings.max_pixels} pixels (width x height) are accepted."
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as exc:
        raise ImageTooLarge(too_large) from exc
    except DECODE_ERRORS as exc:
        raise UndecodableImage(
            "The input is not an image in a format that Pillow reads (JPEG, PNG, WebP, GIF, BMP, TIFF, ...)."
        ) from exc
    width, height = image.size
    if width * height > settings.max_pixels:
        raise ImageTooLarge(too_large)
    decoders = {tile.codec_name for tile in getattr(image, "tile", ())}
    if decoders & Image.DECODERS.keys() and width * height > settings.max_slow_pixels:
        raise ImageTooLarge(
            f"The image is too large; at most {settings.max_slow_pixels} pixels (width x height) are accepted of "
            f"{image.format} files like this one. JPEG or PNG may be larger."
        )
    if image.format in LIBJPEG and count_scans(content) > settings.max_scans:
        raise ImageTooLarge(f"The image has too many scans; at most {settings.max_scans} are accepted.")
    if min(width, height) < settings.min_side:
        raise UndecodableImage(
            f"The image has {width} x {height} pixels; at least {settings.min_side} x {settings.min_side} are needed."
        )
    try:
        if enough is not None:
            image.draft(None, (enough, enough))
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)
    except Image.DecompressionBombError as exc:
        raise ImageTooLarge(too_large) from exc
    except DECODE_ERRORS as exc:
        raise UndecodableImage("The image is truncated or corrupt.") from exc
    return to_8_bit(image)


def count_scans(jpeg: bytes) -> int:
    """Those before the end of the image: what a phone puts behind it, a video say, is not decoded. (ITU T.81, B.1.1)"""
    scans, found = 0, MARKER.search(jpeg, 2)
    while found and found[0] != END_OF_IMAGE:
        scans += found[0] == START_OF_SCAN
        length = int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
        found = MARKER.search(jpeg, found.end() + max(length, 2))
    return scans


def to_8_bit(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> "L", "RGB" or "RGBA"."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(scale_to_8_bit(numpy.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "RGBA"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def scale_to_8_bit(pixels: numpy.ndarray) -> numpy.ndarray:
    """uint16, int32 or float32 [H, W] -> uint8 [H, W].

    The white point is that of the smallest customary range that holds the values: 1.0, 255 or 65535.
    """
    values = numpy.nan_to_num(pixels.astype(numpy.float32))
    if pixels.dtype.kind == "u":  # of either byte order
        white = 65535.0
    else:
        highest = values.max()
        white = 255.0 if 1.0 < highest <= 255.0 else 65535.0
        if pixels.dtype == numpy.float32 and highest <= 1.0:
            white = 1.0
    return (values / white * 255).round().clip(0, 255).astype(numpy.uint8)


def flatten(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image as "RGB", what is transparent shown on `background`."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas
