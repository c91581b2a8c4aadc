"""The name of a file's format, in the error messages of every kind of input."""

import base64
import gzip
import io
import json
import pickle
import zipfile

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers.core import images, sounds
from handlers.core.errors import RequestError, UndecodableImage
from handlers.core.images import FORMATS, ImageLimits, open_image
from handlers.core.signatures import SIGNATURES, format_name
from handlers.core.texts import read_text
from tests.unit.inputs import encode_image, encode_sound, tone_burst

PICTURE = Image.new("RGB", (16, 16))


def box(brand: str) -> bytes:
    """Return the start of a file of the ISO base media format (MP4, HEIC, ...)."""
    return b"\0\0\0\x18ftyp" + brand.encode() + b"\0\0\0\0" + brand.encode() + b"mp41"


def zip_file() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a", "b")
    return content.getvalue()


def numpy_file() -> bytes:
    content = io.BytesIO()
    numpy.save(content, numpy.zeros(3))
    return content.getvalue()


UNREADABLE = {
    "a HEIC image": [box("heic"), box("heix"), box("mif1")],
    "an SVG drawing": [
        b"<svg xmlns='...'/>",
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- by hand -->\n<svg>',
        b"\n <SVG>",
    ],
    "a PDF document": [b"%PDF-1.7\n"],
    "a JPEG XL image": [b"\xff\x0a\xfa", b"\0\0\0\x0cJXL \r\n\x87\n"],
    "an icon (ICO)": [encode_image(PICTURE, "ICO")],
    "a BLP texture": [
        encode_image(PICTURE.convert("P"), "BLP"),
        encode_image(PICTURE.convert("P"), "BLP", blp_version="BLP1"),
    ],
    "an M4A sound (AAC in MP4)": [box("M4A ")],
    "a 3GP recording": [box("3gp5")],
    "a QuickTime film": [box("qt  ")],
    "an MP4 film or sound": [box("isom"), box("mp42")],
    "an AAC sound (ADTS)": [b"\xff\xf1\x50\x80", b"\xff\xf9\x50\x80"],
    "an AMR recording": [b"#!AMR\n", b"#!AMR-WB\n"],
    "a Windows Media file (WMA, WMV)": [bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")],
    "a Matroska film or sound": [b"\x1aE\xdf\xa3\x93B\x82\x88matroska"],
    "an AVI film": [b"RIFF\0\0\0\0AVI LIST"],
    "an HTML page": [b"<!DOCTYPE html>\n<title>404</title>", b"\n<html lang=en>"],
    "a ZIP archive, as .docx, .pptx and .npz files are": [zip_file()],
    "compressed with gzip; send it with Content-Encoding: gzip": [gzip.compress(b"hello")],
    "a NumPy array": [numpy_file()],
    "a pickled Python object": [pickle.dumps({"a": 1}), pickle.dumps(numpy.zeros(3), protocol=2)],
    "JSON; send it with Content-Type: application/json": [json.dumps({"data": "x"}).encode(), b"[[0.5, 1]]", b"[-1]"],
    "a path, not the file; write curl's -F data=@FILE with an @": [b"models/mnist/sample.png", b"C:\\a b.WAV\n"],
}
CASES = [
    pytest.param(name, file, id=f"{name}-{index}") for name, all in UNREADABLE.items() for index, file in enumerate(all)
]


@pytest.mark.parametrize(("name", "file"), CASES)
def test_image_in_a_format_that_is_not_supported_is_rejected_by_its_name(name: str, file: bytes):
    with pytest.raises(UndecodableImage) as found:
        open_image(file, ImageLimits())
    assert str(found.value).endswith(f"TIFF, ...). It is {name}.")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF"])
def test_image_that_ends_in_its_header_is_called_truncated(format: str):
    assert format in FORMATS
    with pytest.raises(UndecodableImage, match=r"truncated") as found:
        open_image(encode_image(PICTURE, format)[:16], ImageLimits())
    assert {"JPEG": "a JPEG", "AVIF": "an AVIF"}.get(format, "") in str(found.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("an MP3 sound", encode_sound(tone_burst(16_000), 16_000, "MP3")),
        ("an MP3 sound", b"ID3\4\0\0\0\0\0\0"),
        ("an Ogg file", encode_sound(tone_burst(16_000), 16_000, "OGG")),
        ("a WebP image", encode_image(PICTURE, "WEBP")),
        ("", b""),
        ("", b"hello, world"),
        ("", bytes(1000)),
    ],
)
def test_name_of_a_file_is_that_of_its_format(name: str, file: bytes):
    assert format_name(file) == name


def test_text_that_is_a_file_is_rejected_by_its_name():
    with pytest.raises(RequestError, match=r"not valid UTF-8. It is a PNG image.$"):
        read_text(encode_image(PICTURE, "PNG"))


@given(st.binary(max_size=600))
def test_name_of_any_file_is_found_or_empty(content: bytes):
    assert isinstance(format_name(content), str)


def test_base64_within_base64_is_no_format():
    assert format_name(base64.b64encode(encode_image(PICTURE, "PNG"))) == ""


def test_formats_that_are_read_have_a_signature():
    names = {name for name, _ in SIGNATURES}
    assert names.issuperset(images.READABLE + sounds.READABLE)
