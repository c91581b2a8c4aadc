"""Images of all accepted formats are opened upright with 8 bits. Others are rejected, large ones before decoding."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from handlers.core.errors import ImageTooLarge, RequestError, UndecodableImage
from handlers.core.images import ImageLimits, flatten, open_image, open_upright
from handlers.image_topk import ImageTopKHandler
from tests.unit.inputs import bare_png, blp_around, damaged, decoded, encode_image, four_colours, icon

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SETTINGS = ImageLimits()
COLOURS = four_colours()
RAMP = numpy.linspace(0, 1, 48 * 32).reshape(32, 48)  # black to white
GREY = Image.fromarray((RAMP * 255).round().astype(numpy.uint8))


def difference(image: Image.Image, other: Image.Image) -> float:
    """Return the mean absolute difference of two RGB images, in 0 to 255."""
    assert image.size == other.size
    return float(abs(numpy.asarray(image, dtype=float) - numpy.asarray(other, dtype=float)).mean())


# --- accepted images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        pytest.param(encode_image(COLOURS, "PNG"), 0, id="png"),
        pytest.param(encode_image(COLOURS.quantize(8), "PNG"), 0, id="png-palette"),
        pytest.param(encode_image(COLOURS, "BMP"), 0, id="bmp"),
        pytest.param(encode_image(COLOURS, "PPM"), 0, id="ppm"),
        pytest.param(encode_image(COLOURS, "TIFF", compression="tiff_lzw"), 0, id="tiff"),
        pytest.param(encode_image(COLOURS, "WEBP", lossless=True), 0, id="webp-lossless"),
        pytest.param(encode_image(COLOURS, "WEBP", quality=95), 10, id="webp"),
        pytest.param(encode_image(COLOURS, "GIF", save_all=True, append_images=[GREY]), 0, id="gif-first-frame"),
        pytest.param(encode_image(COLOURS, "JPEG", quality=95, subsampling=0), 3, id="jpeg"),
        pytest.param(encode_image(COLOURS, "JPEG", quality=95, subsampling=0, progressive=True), 3, id="progressive"),
        pytest.param(encode_image(COLOURS.convert("CMYK"), "JPEG", quality=95), 10, id="jpeg-cmyk"),
        pytest.param(encode_image(COLOURS.convert("CMYK"), "TIFF"), 3, id="tiff-cmyk"),
        pytest.param(encode_image(COLOURS.convert("RGBA"), "PNG"), 0, id="opaque-rgba"),
        pytest.param(encode_image(COLOURS, "JPEG2000"), 3, id="jpeg-2000"),
        pytest.param(encode_image(COLOURS, "AVIF", quality=95), 10, id="avif"),
        pytest.param(encode_image(COLOURS, "TGA"), 0, id="tga-without-magic-bytes"),
    ],
)
def test_open_image_of_each_format_returns_its_colours(content: bytes, tolerance: float):
    assert difference(flatten(open_image(content, SETTINGS)), COLOURS) <= tolerance


def rgb_16_bit() -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow can read and not write."""
    rows = numpy.repeat((RAMP * 65535).astype(">u2")[..., None], 3, axis=2)
    return bare_png(48, 32, depth=16, colour_type=2, pixels=b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        pytest.param(encode_image(GREY, "PNG"), 0, id="L"),
        pytest.param(encode_image(GREY.convert("LA"), "PNG"), 0, id="LA"),
        pytest.param(encode_image(Image.fromarray((RAMP * 65535).astype("<u2")), "PNG"), 1, id="png-16-bit"),
        pytest.param(encode_image(Image.fromarray((RAMP * 65535).astype("<u2")), "TIFF"), 1, id="tiff-16-bit"),
        pytest.param(encode_image(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"), 1, id="tiff-16-bit-big"),
        pytest.param(encode_image(Image.fromarray((RAMP * 65535).astype("i4")), "TIFF"), 1, id="tiff-32-bit"),
        pytest.param(encode_image(Image.fromarray((RAMP * 255).astype("f4")), "TIFF"), 1, id="tiff-float-255"),
        pytest.param(encode_image(Image.fromarray(RAMP.astype("f4")), "TIFF"), 1, id="tiff-float-1"),
        pytest.param(rgb_16_bit(), 1, id="png-48-bit"),
    ],
)
def test_open_image_with_any_grey_or_depth_returns_its_shades(content: bytes, tolerance: float):
    assert difference(flatten(open_image(content, SETTINGS)), GREY.convert("RGB")) <= tolerance


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_open_image_with_dark_16_bit_stays_dark(order: str):
    """Its type decides what white is, not its brightest pixel: here all values are below 256 of 65,535."""
    content = encode_image(Image.fromarray((RAMP * 200).astype(order)), "TIFF")
    assert open_image(content, SETTINGS).getextrema() == (0, 1)


def test_open_image_with_non_finite_floats_returns_black_or_white():
    pixels = numpy.full((8, 8), 0.5, dtype=numpy.float32)
    pixels[0, :3] = [numpy.nan, numpy.inf, -numpy.inf]
    opened = open_image(encode_image(Image.fromarray(pixels), "TIFF"), SETTINGS)
    assert numpy.asarray(opened)[0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize(("size", "enough"), [((1600, 1200), 256), ((720, 721), 256), ((640, 480), 32)])
def test_open_image_of_a_large_jpeg_decodes_only_the_needed_size(size: tuple[int, int], enough: int):
    """After resizing, it differs from the fully decoded image by less than 2 of 255 on average."""
    coarse = numpy.random.default_rng(0).integers(0, 256, (size[1] // 40, size[0] // 40, 3), dtype=numpy.uint8)
    content = encode_image(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    whole, scaled = open_image(content, SETTINGS), open_image(content, SETTINGS, enough)
    assert whole.size == size
    assert enough <= min(scaled.size) < min(size)
    used = [
        numpy.asarray(image.resize((enough, enough), Image.Resampling.BILINEAR), float) for image in (whole, scaled)
    ]
    assert numpy.abs(used[0] - used[1]).mean() < 2


def test_open_image_of_a_jpeg_below_twice_the_needed_size_decodes_it_whole():
    content = encode_image(Image.new("RGB", (500, 400)), "JPEG")
    assert open_image(content, SETTINGS, 256).size == (500, 400)


def test_open_image_with_1_bit_returns_black_and_white():
    image = Image.new("1", (16, 16), 1)
    image.paste(0, (0, 0, 8, 16))
    opened = open_image(encode_image(image, "PNG"), SETTINGS)
    assert (opened.mode, opened.getpixel((0, 0)), opened.getpixel((15, 0))) == ("L", 0, 255)


def transparent(mode: str) -> bytes:
    """Return an image whose left half is transparent; its right half is red, or grey without colours."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (8, 0, 16, 16))
    if mode == "P":
        return encode_image(image.quantize(4), "PNG")
    if mode == "GIF":
        return encode_image(image, "GIF")
    if mode == "tRNS":
        return encode_image(image.convert("RGB"), "PNG", transparency=(0, 0, 0))
    return encode_image(image.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "tRNS"])
def test_flatten_transparency_shows_the_background(mode: str):
    image = open_image(transparent(mode), SETTINGS)
    assert image.mode == "RGBA"
    assert [flatten(image, ink).getpixel((2, 8)) for ink in [(255, 255, 255), (0, 0, 0)]] == [(255,) * 3, (0,) * 3]
    assert flatten(image).getpixel((13, 8)) == ((76, 76, 76) if mode == "LA" else (255, 0, 0))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, lambda image: image),
        (2, ImageOps.mirror),
        (3, lambda image: image.rotate(180)),
        (4, ImageOps.flip),
        (5, lambda image: image.transpose(Image.Transpose.TRANSPOSE)),
        (6, lambda image: image.transpose(Image.Transpose.ROTATE_90)),
        (7, lambda image: image.transpose(Image.Transpose.TRANSVERSE)),
        (8, lambda image: image.transpose(Image.Transpose.ROTATE_270)),
    ],
)
def test_open_image_with_an_orientation_is_upright(orientation: int, stored, format: str):
    """`stored` transforms an upright image to the way in which a camera stores it with this orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    content = encode_image(stored(COLOURS), format, exif=exif)
    assert difference(flatten(open_image(content, SETTINGS)), COLOURS) < 10


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("enough", [None, 100])
def test_open_upright_with_an_orientation_has_the_size_of_the_upright_file(orientation, format, enough):
    exif = Image.Exif()
    exif[0x112] = orientation
    image, size = open_upright(encode_image(four_colours(640, 480), format, exif=exif), SETTINGS, enough)
    assert size == ((480, 640) if orientation in (6, 8) else (640, 480))
    assert image.size == (size if enough is None or format != "JPEG" else tuple(side // 4 for side in size))


# --- rejected images ---------------------------------------------------------------------------------------------

JPEG = encode_image(four_colours(640, 480), "JPEG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not an image", id="empty"),
        pytest.param(b"hello, world\n" * 100, "not an image", id="text"),
        pytest.param(b"%PDF-1.7\n", "not an image", id="pdf"),
        pytest.param(encode_image(COLOURS, "EPS"), "not an image", id="eps-which-starts-ghostscript"),
        pytest.param(JPEG[:20], "not an image", id="jpeg-truncated-in-the-header"),
        pytest.param(JPEG[: len(JPEG) // 2], "truncated", id="jpeg-truncated-in-the-middle"),
        pytest.param(JPEG[:-8], "truncated", id="jpeg-truncated-at-the-end"),
        pytest.param(bare_png(64, 64), "truncated", id="png-without-pixels"),
        pytest.param(encode_image(COLOURS.resize((1, 1)), "PNG"), "1 x 1 pixels; at least 8 x 8", id="1x1"),
        pytest.param(encode_image(COLOURS.resize((500, 7)), "PNG"), "500 x 7 pixels; at least", id="500x7"),
        pytest.param(bare_png(0, 0), "not an image", id="0x0"),
    ],
)
def test_open_image_of_invalid_bytes_is_rejected(content: bytes, message: str):
    with pytest.raises(UndecodableImage, match=message):
        open_image(content, SETTINGS)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(bare_png(50_000, 50_000), id="png"),
        pytest.param(bare_png(8_000, 8_000), id="png-of-64-million-pixels"),
        pytest.param(bare_png(2**31 - 1, 2**31 - 1), id="png-of-the-largest-size"),
        pytest.param(bare_png(50_000_001, 1), id="png-of-one-line"),
        pytest.param(b"GIF89a" + struct.pack("<HHxxxcHHHHxx", 8, 8, b",", 0, 0, 65535, 65535), id="gif-frame"),
        pytest.param(b"P6 50000 50000 255\n", id="ppm"),
    ],
)
def test_open_image_above_the_pixel_limit_is_rejected_before_decoding(content: bytes, monkeypatch: pytest.MonkeyPatch):
    def reached(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.core, "new", reached)  # where Pillow allocates
    monkeypatch.setattr(Image.core, "fill", reached)
    with pytest.raises(ImageTooLarge, match="at most 50000000 pixels"):
        open_image(content, SETTINGS)


def test_open_image_at_the_pixel_limit_is_accepted():
    limits = ImageLimits(max_pixels=48 * 32, min_side=32)
    assert open_image(encode_image(COLOURS, "PNG"), limits).size == (48, 32)


@pytest.mark.parametrize(("pixels", "refused"), [(b"\1" * 1600, False), (b"\1" * 1640, True)])
def test_open_image_of_a_slow_format_has_a_lower_limit(pixels: bytes, refused: bool):
    """A PPM of 16 million pixels whose white is 254 takes 9 s: a batch of them would exceed the response timeout."""
    limits = ImageLimits(max_slow_pixels=1600)
    content = b"P5 40 %d 254\n" % (len(pixels) // 40) + pixels
    assert open_image(content.replace(b" 254\n", b" 255\n"), limits)
    if refused:
        with pytest.raises(ImageTooLarge, match="at most 1600 pixels .* in PPM files"):
            open_image(content, limits)
    else:
        assert open_image(content, limits).size == (40, 40)


def test_scan_limit_ignores_bytes_outside_the_image():
    """A phone may append a video to a photo, and a thumbnail inside a file has its own scans."""
    trailer = b"\xff\xda" * 200
    photo = JPEG
    assert open_image(photo + trailer, SETTINGS).size == open_image(photo, SETTINGS).size
    thumbnail = b"\xff\xe2" + (len(trailer) + 2).to_bytes(2, "big") + trailer
    assert open_image(photo[:2] + thumbnail + photo[2:], SETTINGS).size == open_image(photo, SETTINGS).size


@pytest.mark.parametrize(
    ("format", "scans", "refused"), [("JPEG", 100, False), ("JPEG", 101, True), ("MPO", 101, True)]
)
def test_jpeg_with_more_scans_than_the_limit_is_rejected(format: str, scans: int, refused: bool):
    """A scan has 95 bytes and takes 30 ms with 48 million pixels: a file of 16 MiB would take more than an hour."""
    more = {"save_all": True, "append_images": [COLOURS]} if format == "MPO" else {}
    content = encode_image(COLOURS, format, progressive=True, **more)
    end = content.index(b"\xff\xd9")
    last = content[content.rindex(b"\xff\xda", 0, end) : end]
    content = content[:end] + last * (scans - content[:end].count(b"\xff\xda")) + content[end:]
    if refused:
        with pytest.raises(ImageTooLarge, match="at most 100 are accepted"):
            open_image(content, SETTINGS)
    else:
        assert open_image(content, SETTINGS).size == COLOURS.size


def iptc_around(image: bytes) -> bytes:
    def tag(dataset: tuple[int, int], data: bytes) -> bytes:
        return b"\x1c" + bytes(dataset) + struct.pack(">H", len(data)) + data

    size = tag((3, 20), struct.pack(">H", 48)) + tag((3, 30), struct.pack(">H", 32))
    return tag((3, 60), b"\1\0") + size + tag((3, 120), b"\5") + tag((8, 10), image)


INSIDE = encode_image(COLOURS, "PNG")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(icon("ICO", INSIDE), id="ico"),
        pytest.param(icon("ICO", encode_image(COLOURS, "BMP")[14:]), id="ico-bmp"),
        pytest.param(icon("ICNS", encode_image(COLOURS.resize((32, 32)), "PNG")), id="icns"),
        pytest.param(icon("ICNS", encode_image(COLOURS.resize((32, 32)), "JPEG2000")), id="icns-jpeg-2000"),
        pytest.param(blp_around(encode_image(COLOURS, "JPEG"), *COLOURS.size), id="blp"),
        pytest.param(iptc_around(INSIDE), id="iptc"),
        pytest.param(iptc_around(encode_image(COLOURS, "EPS")), id="iptc-eps-which-starts-ghostscript"),
    ],
)
def test_file_inside_another_file_is_rejected(content: bytes, request: pytest.FixtureRequest):
    """Pillow opens each of these files, but the limits are checked for the outer file only."""
    if "eps" not in request.node.callspec.id:  # opening EPS needs Ghostscript
        Image.open(io.BytesIO(content)).load()
    with pytest.raises(UndecodableImage, match="supported format"):
        open_image(content, SETTINGS)


def test_size_that_is_known_only_after_decoding_is_checked(monkeypatch: pytest.MonkeyPatch):
    """The directory of an icon file may declare another size than the image in it has."""
    content = icon("ICO", encode_image(four_colours(100, 100), "PNG"))
    monkeypatch.setattr("handlers.core.images.FORMATS", ("ICO",))
    with pytest.raises(ImageTooLarge, match="at most 1024 pixels"):
        open_image(content, ImageLimits(max_pixels=32 * 32))


def test_broken_metadata_prints_no_warnings():
    """Each warning has another text, and a worker would store and log every one."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + bytes(range(1, 40))
    content = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + JPEG[2:]
    code = "import sys; from handlers.core.images import *; open_image(sys.stdin.buffer.read(), ImageLimits())"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], input=content, cwd=root, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


# --- arbitrary bytes ---------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "TGA", "PPM", "JPEG2000", "AVIF")
ORIGINALS = {
    **{format: encode_image(COLOURS, format) for format in FORMATS},
    **{compression: encode_image(COLOURS, "TIFF", compression=compression) for compression in ("tiff_lzw", "jpeg")},
    "palette": encode_image(COLOURS.quantize(8), "PNG", transparency=1),
    "CMYK": encode_image(COLOURS.convert("CMYK"), "JPEG"),
}


@given(st.one_of(st.binary(), damaged(ORIGINALS)))
def test_open_image_of_any_bytes_returns_an_image_or_a_request_error(content: bytes):
    try:
        image = open_image(content, SETTINGS)
    except RequestError:
        return
    assert image.mode in ("L", "RGB", "RGBA")
    assert min(image.size) >= SETTINGS.min_side


# --- the handler's sample ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("content", [JPEG, transparent("LA"), transparent("RGBA"), rgb_16_bit()], ids=len)
def test_sample_has_the_shape_and_type_of_the_example(content: bytes, channels: int):
    handler = ImageTopKHandler()
    handler.settings = handler.Settings(resize=24, crop=20, channels=channels)
    sample, example = decoded(handler, content), handler.example().tensors
    assert (sample.shape, sample.dtype) == (example.shape, example.dtype)
