"""Decode the bytes of an image file into an upright 8-bit Pillow image. Sizes are checked before a pixel is decoded."""

import struct
import warnings
import zlib
from typing import Annotated

import numpy
from PIL import ExifTags, Image
from pydantic import BaseModel, Field

from handlers.core.errors import ImageTooLarge, UndecodableImage
from handlers.core.image_parts import PartReader, check_parts, open_parts
from handlers.core.signatures import describe_format

# Pillow's warnings about broken metadata differ from file to file: Python would log and keep every one of them
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.init()
# Common formats first, because Pillow tries one after the other. JPEG includes MPO; TGA is last, because it has no
# signature. Pillow's other formats are used by icons, games and old programs. Some of them contain a file of another
# format (ICO, ICNS, BLP, IPTC), to which the limits would not apply, and EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")
UNREADABLE = "The input is not an image in a supported format (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF, ...)."
READABLE = (
    "a JPEG image",
    "a PNG image",
    "a WebP image",
    "a GIF image",
    "an AVIF image",
    "a TIFF image",
)  # signatures.py

# EXIF orientation -> the operation that turns the image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # the orientations that exchange width and height

# what Pillow raises on broken files, as its source and fuzzing show; SystemError if a read fails within its C code
DECODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


Shares = tuple[float, float, float, float]  # left, top, right and bottom, in shares of an image's sides
WHOLE: Shares = (0.0, 0.0, 1.0, 1.0)


class ImageLimits(BaseModel):
    max_pixels: Annotated[int, Field(gt=0)] = 50_000_000  # width x height; a 48-megapixel photograph passes
    # the same for formats that Pillow decodes in Python, at 1 us per pixel: run-length BMP, PPM of other than 8 bits
    max_slow_pixels: Annotated[int, Field(gt=0)] = 2_000_000
    max_scans: Annotated[int, Field(gt=0)] = 100  # of a JPEG: 95 bytes can be a scan, and each visits all pixels
    # reads of a file; a part takes up to four. A PNG of 16 MiB in chunks of 4 KiB takes 12,300
    max_parts: Annotated[int, Field(gt=0)] = 20_000
    min_side: Annotated[int, Field(gt=0)] = 8  # pixels


def open_image(content: bytes, settings: ImageLimits, enough: int | None = None) -> Image.Image:
    """Decode the first frame, and turn it upright as its EXIF orientation says: the image of `open_upright`."""
    return open_upright(content, settings, enough)[0]


def open_upright(
    content: bytes, settings: ImageLimits, enough: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the first frame, turn it upright as its EXIF orientation says, and find its size in the file.

    Args:
        content: the bytes of the file.
        settings: the limits.
        enough: the pixels of the shorter side that the caller needs. A JPEG of at least twice as many is decoded at a
            half, a quarter or an eighth of its size (libjpeg's scaled inverse DCT), never with fewer than `enough`.

    Returns:
        an image of mode "L", "RGB" or "RGBA", with all pixels decoded; 16-bit and floating-point pixels are scaled to
        8 bits; and the width and height of the upright image, before any reduction by `enough`.

    Raises:
        UndecodableImage: the file is not an image, is broken, or is smaller than `min_side`.
        ImageTooLarge: the image exceeds `max_pixels`, `max_slow_pixels`, `max_scans` or `max_parts`.
    """
    Image.MAX_IMAGE_PIXELS = settings.max_pixels  # Pillow checks sizes that are known late, such as a GIF's frame
    problem = ""
    try:
        check_parts(content, settings.max_parts, settings.max_scans)
        reader = open_parts(content, settings.max_parts)
        image = Image.open(reader, formats=FORMATS)
        problem = "The image is truncated or corrupt."
        check_size(image, settings)
        if isinstance(reader, PartReader) and decodes_in_python(image):
            reader.left += 4 * image.width * image.height  # more reads than the pixels take
        size = image.size
        drafted = image.draft(None, (enough, enough)) if enough is not None else None
        image.load()
        if drafted is None:
            size = image.size  # Pillow knows the size of some formats, and turns a TIFF, only now
        check_pixels(image, settings.max_pixels)  # again: in some formats the size is known only now
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in SIDEWAYS:
            size = size[::-1]
        turn = TURNS.get(orientation)
        return to_8_bit(image if turn is None else image.transpose(turn)), size
    except Image.DecompressionBombError as exc:
        raise too_many_pixels(settings.max_pixels) from exc
    except DECODE_ERRORS as exc:
        raise UndecodableImage(problem or UNREADABLE + describe_format(content, READABLE)) from exc


def upright_size(content: bytes, settings: ImageLimits) -> tuple[int, int]:
    """Return width and height of the upright image of a file that `open_image` accepts."""
    return open_upright(content, settings, enough=1)[1]


def check_size(image: Image.Image, settings: ImageLimits) -> None:
    """Check the size in the head of the file, before its pixels are decoded.

    Raises:
        UndecodableImage: the image is smaller than `min_side`.
        ImageTooLarge: the image exceeds `max_pixels` or `max_slow_pixels`.
    """
    check_pixels(image, settings.max_pixels)
    if decodes_in_python(image):
        note = f" in {image.format} files of this kind. JPEG and PNG files may be larger"
        check_pixels(image, settings.max_slow_pixels, note)
    if min(image.size) < settings.min_side:
        raise UndecodableImage(
            f"The image is too small: it has {image.width} x {image.height} pixels; at least {settings.min_side} x "
            f"{settings.min_side} are required."
        )


def check_pixels(image: Image.Image, limit: int, note: str = "") -> None:
    if image.width * image.height > limit:
        raise too_many_pixels(limit, note)


def too_many_pixels(limit: int, note: str = "") -> ImageTooLarge:
    return ImageTooLarge(f"The image is too large; at most {limit} pixels (width x height) are accepted{note}.")


def decodes_in_python(image: Image.Image) -> bool:
    return any(tile.codec_name in Image.DECODERS for tile in getattr(image, "tile", ()))


def to_8_bit(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to "L", "RGB" or "RGBA"."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(scale_to_8_bit(numpy.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "RGBA"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def scale_to_8_bit(pixels: numpy.ndarray) -> numpy.ndarray:
    """Scale uint16, int32 or float32 [H, W] to uint8 [H, W].

    White is the smallest of 1.0, 255 and 65535 that is not below the values; 1.0 for float32 only, 65535 for uint16.
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
    """Convert to "RGB", with transparent pixels on `background`."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def resized(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Return width and height after the shorter side is resized to `resize` pixels."""
    width, height = size
    return (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
