"""Parts of an image file (segments, chunks, blocks, tags): broken ones are request errors, too many are rejected."""

import contextlib
import io
import struct
import time
import zlib

import numpy
import pytest
from PIL import Image, PngImagePlugin

from handlers.core.errors import ImageTooLarge, UndecodableImage
from handlers.core.images import FORMATS, ImageLimits, open_image
from handlers.image_topk import ImageTopKHandler
from tests.unit.inputs import (
    bare_png,
    bare_tiff,
    decoded,
    encode_image,
    four_colours,
    jpeg_segment,
    png_chunk,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS = ImageLimits()
COLOURS = four_colours()
JPEG = encode_image(four_colours(640, 480), "JPEG")
PNG = encode_image(COLOURS, "PNG")


def handler() -> ImageTopKHandler:
    made = ImageTopKHandler()
    made.settings = made.Settings(resize=24, crop=20)
    return made


# --- broken parts ------------------------------------------------------------------------------------------------

PALETTE = png_chunk(b"PLTE", bytes(range(48)))
PIXELS = (b"\0" + bytes(16)) * 16
ORIENTED = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x112, 3, 1, 6)  # EXIF orientation 6: rotated by 90 degrees


def palette_png(*chunks: bytes, pixels: bytes = PIXELS) -> bytes:
    return bare_png(16, 16, colour_type=3, pixels=pixels, chunks=b"".join(chunks))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(palette_png(PALETTE, png_chunk(b"tRNS", bytes(300))), id="more-transparency-than-palette"),
        pytest.param(palette_png(PALETTE, png_chunk(b"tRNS", b"\x80" * 257)), id="transparency-of-257"),
        pytest.param(palette_png(PALETTE, png_chunk(b"tRNS", bytes(1 << 20))), id="transparency-of-a-mebibyte"),
        pytest.param(palette_png(png_chunk(b"PLTE", bytes(3000))), id="palette-of-1000"),
        pytest.param(palette_png(png_chunk(b"PLTE", bytes(47))), id="palette-truncated-in-a-colour"),
        pytest.param(palette_png(png_chunk(b"PLTE")), id="palette-empty"),
        pytest.param(palette_png(), id="palette-missing"),
        pytest.param(palette_png(PALETTE, pixels=(b"\0" + b"\xff" * 16) * 16), id="palette-too-short"),
        pytest.param(palette_png(PALETTE, PALETTE, png_chunk(b"tRNS"), png_chunk(b"tRNS", b"\0")), id="repeated"),
        pytest.param(palette_png(png_chunk(b"tRNS", b"\0"), PALETTE), id="transparency-before-palette"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"tRNS", b"\0")), id="grey-transparency-short"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"tRNS", bytes(6))), id="grey-transparency-long"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"iCCP", b"x")), id="profile-name-unterminated"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"iCCP", b"x\0\1")), id="profile-unknown-method"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"cHRM", b"x")), id="chromaticity-short"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"acTL", bytes(8))), id="no-frames"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"fcTL", bytes(26))), id="frame-empty"),
        pytest.param(bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"eXIf", b"MM\0*")), id="exif-truncated"),
        pytest.param(
            bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"eXIf", ORIENTED[:-4])), id="exif-truncated-in-a-tag"
        ),
        pytest.param(JPEG[:2] + jpeg_segment(0xE1, b"Exif\0\0" + b"\xff" * 40) + JPEG[2:], id="jpeg-exif"),
        pytest.param(JPEG[:2] + jpeg_segment(0xE2, b"MPF\0II*\0\xff\0\0\0") + JPEG[2:], id="jpeg-mpo-index"),
        pytest.param(JPEG[:2] + jpeg_segment(0xE2, b"ICC_PROFILE\0") + JPEG[2:], id="jpeg-profile-without-a-number"),
        pytest.param(JPEG[:2] + jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM") + JPEG[2:], id="jpeg-photoshop"),
        pytest.param(
            bare_tiff({256: (3, 1, 16), 257: (3, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1)}), id="tiff-no-strips"
        ),
        pytest.param(b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 8, b"jp2h"), id="jp2-empty-header"),
        pytest.param(b"GIF89a" + struct.pack("<HHxxx", 16, 16) + b"!", id="gif-truncated-in-an-extension"),
        pytest.param(b"P6 16 16 0 " + bytes(768), id="ppm-white-is-zero"),
    ],
)
def test_broken_part_is_decoded_or_a_request_error(content: bytes):
    with contextlib.suppress(UndecodableImage):
        assert decoded(handler(), content).shape == handler().example().tensors.shape


def test_more_transparency_than_palette_is_rejected():
    with pytest.raises(UndecodableImage, match="truncated or corrupt"):
        open_image(palette_png(PALETTE, png_chunk(b"tRNS", bytes(300))), SETTINGS)


@pytest.mark.parametrize(
    "error", [AssertionError, ZeroDivisionError, LookupError, SystemError, zlib.error, struct.error]
)
@pytest.mark.parametrize("stage", ["load", "getexif", "convert"])
def test_pillows_error_in_any_stage_is_a_request_error(
    stage: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error("broken")

    content = encode_image(COLOURS.quantize(8), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, stage, fail)
    with pytest.raises(UndecodableImage, match="truncated or corrupt"):
        open_image(content, SETTINGS)


# --- many parts --------------------------------------------------------------------------------------------------


def read_count(content: bytes) -> int:
    """Count the reads in which Pillow decodes a file."""

    class Counted(io.BytesIO):
        count = 0

        def read(self, *size: int) -> bytes:
            self.count += 1
            return super().read(*size)

    file = Counted(content)
    Image.open(file, formats=FORMATS).load()
    return file.count


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "PPM"])
def test_file_with_more_parts_than_the_limit_is_rejected(format: str):
    content = encode_image(COLOURS, format)
    most = read_count(content)
    assert open_image(content, ImageLimits(max_parts=most)).size == COLOURS.size
    with pytest.raises(ImageTooLarge, match=f"too many parts .* at most {most - 1} are read"):
        open_image(content, ImageLimits(max_parts=most - 1))


# without the limit, each takes from one second to a minute to decode
FLOODS = {
    "jpeg-segments": JPEG[:2] + jpeg_segment(0xE1) * 500_000 + JPEG[2:],
    "jpeg-segments-behind-the-scan": JPEG[:-2] + jpeg_segment(0xE1) * 2_000_000 + JPEG[-2:],
    "jpeg-fill-bytes": JPEG[:2] + b"\xff" * 4_000_000 + JPEG[2:],
    "jpeg-ends-before-it-starts": JPEG[:2] + b"\xff\xd9" * 2_000_000 + JPEG[2:],
    "jpeg-tables": JPEG[:2] + jpeg_segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 200 + JPEG[2:],
    "jpeg-photoshop": JPEG[:2]
    + jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 200
    + JPEG[2:],
    "png-chunks": bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"abCd") * 500_000),
    "png-empty-pixels": bare_png(16, 16, pixels=PIXELS, chunks=png_chunk(b"IDAT") * 500_000),
    "png-profiles": bare_png(
        16, 16, pixels=PIXELS, chunks=png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 1000
    ),
    "gif-blocks": b"GIF89a" + struct.pack("<HHxxx", 16, 16) + b"!\xfe" + b"\1x" * 2_000_000,
    "gif-extensions": b"GIF89a" + struct.pack("<HHxxx", 16, 16) + b"!\xfe\0" * 2_000_000,
    "tiff-tags": bare_tiff({tag: (3, 1, 1) for tag in range(1000, 60_000)}),
    "tiff-strips": bare_tiff(
        {256: (3, 1, 16), 257: (3, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 500_000, 0)}
        | {278: (3, 1, 1)},
        bytes(2_000_000),
    ),
    "ppm-spaces": b"P5" + b" " * 4_000_000 + b"16 16 255 " + bytes(256),
    "ppm-comment": b"P5 #" + b" " * 4_000_000 + b"\n16 16 255 " + bytes(256),
    "ppm-comments": b"P2 16 16 255 " + b"#\n" * 500_000 + b"1 " * 256,
    "bmp-ends-of-line": encode_image(COLOURS.quantize(8), "BMP")[:30].ljust(30)
    + struct.pack("<I", 1)
    + encode_image(COLOURS.quantize(8), "BMP")[34:1078]
    + bytes(4_000_000),
    "jpeg-2000-markers": b"\xff\x4f\xff\x51"
    + struct.pack(">HHIIIIIIIIHBBB", 41, 0, 16, 16, 0, 0, 16, 16, 0, 0, 1, 7, 1, 1)
    + b"\xff\x30\0\2" * 1_000_000,
    "jp2-boxes": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * 500_000,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_millions_of_parts_are_rejected_within_half_a_second(flood: str):
    start = time.thread_time()
    with pytest.raises(ImageTooLarge, match="too many parts"):
        open_image(FLOODS[flood], SETTINGS)
    assert time.thread_time() - start < 0.5


NOISE = numpy.random.default_rng(0).bytes(2_000_000)


def in_chunks(size: int) -> bytes:
    """Return a PNG of 15 MB whose pixels are in chunks of `size` bytes."""
    data = zlib.compress(b"".join(b"\0" + NOISE[row : row + 5000] for row in range(3000)), 0)
    chunks = b"".join(png_chunk(b"IDAT", data[at : at + size]) for at in range(0, len(data), size))
    return bare_png(5000, 3000)[:33] + chunks + png_chunk(b"IEND")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(in_chunks(8192), id="png-of-8-kib-chunks"),
        pytest.param(in_chunks(4096), id="png-of-4-kib-chunks"),
        pytest.param(PNG + bytes(1_000_000), id="png-with-trailing-bytes"),
        pytest.param(encode_image(COLOURS, "JPEG", icc_profile=NOISE), id="jpeg-profile-in-31-segments"),
        pytest.param(encode_image(COLOURS, "PNG", icc_profile=NOISE[:500_000]), id="png-profile"),
        pytest.param(
            JPEG[:2] + jpeg_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) * 200 + JPEG[2:],
            id="jpeg-of-13-mb-of-metadata",
        ),
        pytest.param(JPEG[:2] + b"\xff" * 4096 + JPEG[2:], id="jpeg-with-fill-bytes"),
        pytest.param(encode_image(COLOURS, "GIF", comment=b"x" * 60_000), id="gif-comment"),
        pytest.param(encode_image(Image.new("L", (64, 8000)), "TIFF", tiffinfo={278: 1}), id="tiff-strip-per-row"),
    ],
)
def test_photo_with_many_parts_is_opened(content: bytes):
    assert open_image(content, SETTINGS).width > 0
