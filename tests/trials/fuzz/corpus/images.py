"""Generate images of every format that the handlers accept, and of some that they reject."""

import struct
import zlib
from functools import cache

import numpy
from PIL import Image

from tests.unit.inputs import DIGITS, bare_png, draw_digit, encode_image

SIDE = 64


def digits() -> dict[str, bytes]:
    return {f"digit {digit}": encode_image(draw_digit(digit), "PNG") for digit in DIGITS}


@cache
def images() -> dict[str, bytes]:
    return {**small(), **large()}


@cache
def small() -> dict[str, bytes]:
    """Return images of 64 x 64 pixels in many formats, by name."""
    grey = draw_digit(3, SIDE)
    colour = Image.merge("RGB", [grey, grey.rotate(90), grey.point(lambda value: 255 - value)])
    alpha = colour.copy()
    alpha.putalpha(grey)
    return {**pngs(grey, colour, alpha), **jpegs(grey, colour), **others(grey, colour, alpha)}


def pngs(grey: Image.Image, colour: Image.Image, alpha: Image.Image) -> dict[str, bytes]:
    frames = [colour.rotate(angle) for angle in (30, 60, 90)]
    deep = Image.fromarray((numpy.asarray(grey).astype(numpy.uint16) * 257).astype("<u2"))
    return {
        "png 1 bit": encode_image(grey.convert("1"), "PNG"),
        "png grey": encode_image(grey, "PNG"),
        "png grey alpha": encode_image(alpha.convert("LA"), "PNG"),
        "png 16 bit": encode_image(deep, "PNG"),
        "png colour": encode_image(colour, "PNG"),
        "png palette": encode_image(colour.quantize(16), "PNG", transparency=1),
        "png alpha": encode_image(alpha, "PNG"),
        "png transparent colour": encode_image(colour, "PNG", transparency=(0, 0, 0)),
        "png interlaced": interlaced(numpy.asarray(grey)),
        "png animated": encode_image(colour, "PNG", save_all=True, append_images=frames),
        "png tagged": encode_image(colour, "PNG", exif=orientation(6), dpi=(300, 300)),
    }


def jpegs(grey: Image.Image, colour: Image.Image) -> dict[str, bytes]:
    turned = {f"jpeg turned {turn}": encode_image(colour, "JPEG", exif=orientation(turn)) for turn in range(2, 9)}
    return {
        "jpeg": encode_image(colour, "JPEG"),
        "jpeg grey": encode_image(grey, "JPEG"),
        "jpeg cmyk": encode_image(colour.convert("CMYK"), "JPEG"),
        "jpeg progressive": encode_image(colour, "JPEG", progressive=True),
        "jpeg progressive, large": encode_image(Image.new("L", (2000, 1500), 100), "JPEG", progressive=True),
        "jpeg restarts": encode_image(colour, "JPEG", restart_marker_blocks=2, subsampling=2),
        "jpeg of several": encode_image(colour, "MPO", save_all=True, append_images=[colour]),
        **turned,
    }


def others(grey: Image.Image, colour: Image.Image, alpha: Image.Image) -> dict[str, bytes]:
    frames = [colour.rotate(angle) for angle in (30, 60)]
    floats = Image.fromarray(numpy.asarray(grey).astype(numpy.float32) / 255)
    found = {
        "gif animated": encode_image(colour, "GIF", save_all=True, append_images=frames),
        "webp": encode_image(colour, "WEBP"),
        "webp lossless": encode_image(alpha, "WEBP", lossless=True),
        "webp animated": encode_image(colour, "WEBP", save_all=True, append_images=frames),
        "bmp palette": encode_image(colour.quantize(16), "BMP"),
        "bmp 1 bit": encode_image(grey.convert("1"), "BMP"),
        "ico": encode_image(alpha, "ICO", sizes=[(16, 16), (32, 32)]),
        "tiff pages": encode_image(colour, "TIFF", save_all=True, append_images=frames),
        "tiff float": encode_image(floats, "TIFF"),
        "tiff tiled": encode_image(colour, "TIFF", compression="tiff_lzw", tiffinfo={322: 16, 323: 16}),
        "tiff cmyk": encode_image(colour.convert("CMYK"), "TIFF", compression="packbits"),
        "ppm 16 bit": b"P5 16 16 65535\n" + bytes(range(256)) * 2,
        "ppm plain": b"P2\n16 16\n9\n" + b"1 9 " * 128,
    }
    found |= {f"tiff {how}": encode_image(colour, "TIFF", compression=how) for how in ("jpeg", "tiff_deflate", "zstd")}
    for format in ("AVIF", "BMP", "ICNS", "JPEG2000", "PPM", "TGA"):
        found[format.lower()] = encode_image(colour, format)
    found["blp"] = encode_image(colour.quantize(8), "BLP")
    return found


def large() -> dict[str, bytes]:
    """Return small files with the maximum number of pixels, and with more."""
    digit = draw_digit(3, 500)
    canvas = Image.new("1", (10_000, 5_000))
    canvas.paste(digit.resize((4_000, 4_000)), (3_000, 500))
    return {
        "png at the limit": encode_image(canvas, "PNG"),
        "png past the limit": bare_png(10_000, 5_001),
        "png bomb": bare_png(2**31 - 1, 2**31 - 1),
        "gif at the limit": encode_image(canvas, "GIF"),
        "tiff at the limit": encode_image(canvas, "TIFF", compression="group4"),
    }


def interlaced(pixels: numpy.ndarray) -> bytes:
    """Return pixels (uint8 [H, W]) as an interlaced PNG (Adam7, seven passes), which Pillow cannot write."""
    height, width = pixels.shape
    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [pixels[top::down, left::across] for top, left, down, across in steps]
    data = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    content = bytearray(bare_png(width, height, pixels=data))
    content[28] = 1  # the interlace method, in IHDR
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = turn
    return exif
