"""Generated inputs of the unit tests: images, digits, sounds, and damaged files."""

import io
import math
import struct
import zlib

import numpy
import soundfile
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from handlers.core.batch import BatchHandler
from handlers.core.request import RequestReader

# --- images ------------------------------------------------------------------------------------------------------


def encode_image(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def four_colours(width: int = 48, height: int = 32) -> Image.Image:
    """Return red, green, blue and white quarters, clockwise from the upper left: no rotation or reflection is equal."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("white", (width // 2, height // 2, width, height))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def white_box(width: int, height: int, box: tuple[int, int, int, int]) -> bytes:
    """A black PNG with one white box: x1, y1, x2, y2 in sixteenths of the sides."""
    image = Image.new("L", (width, height))
    x1, y1, x2, y2 = (share * side / 16 for share, side in zip(box, (width, height) * 2, strict=True))
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=255)
    return encode_image(image, "PNG")


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(
    width: int, height: int, depth: int = 8, colour_type: int = 0, pixels: bytes = b"\0", chunks: bytes = b""
) -> bytes:
    """Return a PNG file with `chunks` before its pixels. By default, its pixels end after one byte."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + data + png_chunk(b"IEND")


def jpeg_segment(marker: int, data: bytes = b"") -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def bare_tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """Return a little-endian TIFF file with one directory.

    Args:
        tags: {tag: (type, count, value)}; if the values do not fit into the entry, `value` is an offset into `data`.
    """
    start = 14 + 12 * len(tags)
    fits = {3: 2, 4: 1}  # SHORT, LONG: the number of values that fit into the entry
    entries = [
        struct.pack("<HHII", tag, kind, count, value if count <= fits[kind] else start + value)
        for tag, (kind, count, value) in sorted(tags.items())
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def icon(format: str, image: bytes) -> bytes:
    """Return an icon file that declares 32 x 32 pixels and contains `image`, a PNG or JPEG 2000 file."""
    if format == "ICO":
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(image), 22) + image
    return b"icns" + struct.pack(">I4sI", len(image) + 16, b"ic11", len(image) + 8) + image


def blp_around(jpeg: bytes, width: int = 8, height: int = 8) -> bytes:
    """Return a BLP1 texture that declares `width` x `height` pixels and contains `jpeg`."""
    head = b"BLP1" + struct.pack("<IIIIII", 0, 0, width, height, 5, 0)
    offsets = struct.pack("<16I16I", 160, *[0] * 15, len(jpeg), *[0] * 15)
    return head + offsets + struct.pack("<I", 0) + jpeg


# --- digits: lines and arcs in the unit square, drawn with a round pen -------------------------------------------


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    angles = numpy.radians(numpy.linspace(start, end, 40))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


DIGITS = {
    0: [arc(0.5, 0.5, 0.28, 0.5, 0, 360)],
    1: [[(0.36, 0.22), (0.55, 0), (0.55, 1)]],
    2: [[*arc(0.5, 0.28, 0.3, 0.28, 180, 400), (0.2, 1), (0.82, 1)]],
    3: [[*arc(0.5, 0.25, 0.28, 0.25, 200, 450), *arc(0.5, 0.73, 0.32, 0.27, 270, 520)]],
    4: [[(0.62, 1), (0.62, 0), (0.15, 0.68), (0.85, 0.68)]],
    7: [[(0.18, 0), (0.82, 0), (0.4, 1)]],
}


def draw_digit(
    digit: int = 3, size: int = 112, height: float = 0.7, stroke: float = 0.12, x: float = 0.5, y: float = 0.5
) -> Image.Image:
    """Draw a digit in white on black, mode "L".

    Args:
        size: pixels of the square image.
        height: height of the digit, as a fraction of `size`.
        stroke: width of the pen, as a fraction of the digit's height.
        x, y: centre of the digit, as fractions of `size`.
    """
    scale = 4 if size < 400 else 1  # drawn large and reduced, for smooth edges
    canvas = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(canvas)
    length = height * size * scale
    pen = max(1, round(stroke * length))
    for line in DIGITS[digit]:
        points = [(x * canvas.width + (u - 0.5) * length, y * canvas.height + (v - 0.5) * length) for u, v in line]
        draw.line(points, fill=255, width=pen, joint="curve")
        for u, v in (points[0], points[-1]):
            draw.ellipse((u - pen / 2, v - pen / 2, u + pen / 2, v + pen / 2), fill=255)
    return canvas.resize((size, size), Image.Resampling.BOX)


def blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


# --- sounds ------------------------------------------------------------------------------------------------------

BLOCK = 16_384  # samples written at a time: libsndfile's Vorbis encoder overflows the stack on minutes at once


def tone_burst(sample_rate: int, seconds: float = 1.0, at: float = 0.5, hertz: float = 440.0) -> numpy.ndarray:
    """Return float32 [samples]: silence, and a tone of half a second with a Hann envelope, centred at `at` seconds."""
    time = numpy.arange(round(seconds * sample_rate)) / sample_rate - at
    envelope = numpy.where(abs(time) < 0.25, numpy.cos(2 * math.pi * time) ** 2, 0)
    return (0.5 * envelope * numpy.sin(2 * math.pi * hertz * time)).astype(numpy.float32)


def encode_sound(
    samples: numpy.ndarray, sample_rate: int = 16_000, format: str = "WAV", subtype: str | None = None
) -> bytes:
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(buffer, "w", sample_rate, channels, subtype, format=format) as file:
        for start in range(0, len(samples), BLOCK):
            file.write(samples[start : start + BLOCK])
    return buffer.getvalue()


# --- damage ------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, originals: dict[str, bytes]) -> bytes:
    """Overwrite, insert or remove bytes of a file up to eight times, mostly near its beginning."""
    content = bytearray(originals[draw(st.sampled_from(sorted(originals)))])
    for _ in range(draw(st.integers(1, 8))):
        reach = draw(st.sampled_from([64, 1024, len(content)]))
        at = draw(st.integers(0, max(0, min(reach, len(content)) - 1)))
        length = draw(st.integers(0, 16))
        content[at : at + length] = draw(st.binary(max_size=16))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def decoded(handler: BatchHandler, content: bytes | str) -> Tensor:
    """Decode a raw body with this handler."""
    reader = RequestReader(handler.Inputs, handler.Options, max_instances=1)
    [inputs] = reader.read({"body": content}, {}).inputs
    return handler.decode(inputs).tensors
