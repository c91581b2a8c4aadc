"""Invalid inputs over HTTP are answered with a 4xx of the bundle, and the worker survives."""

import io
import json
import struct
import zlib

import numpy
import pytest
import requests
import soundfile
from PIL import Image

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TEXT = {"Content-Type": "text/plain"}


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size but has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(side: int) -> bytes:
    file = io.BytesIO()
    pixels = numpy.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def sound(samples: numpy.ndarray, rate: int = 16000, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=kind)
    return file.getvalue()


def with_option(value: object) -> dict:
    return {"data": json.dumps({"data": "hello", "top_k": value}), "headers": JSON}


IMAGES = {
    "empty body": ({"data": b""}, 400, "EmptyInput"),
    "truncated JPEG": ({"data": jpeg(200)[:3000]}, 400, "UndecodableImage"),
    "a text as image": ({"data": b"this is no image"}, 400, "UndecodableImage"),
    "1 x 1": ({"data": jpeg(1)}, 400, "UndecodableImage"),
    "50,000 x 50,000": ({"data": png_header(50_000, 50_000)}, 413, "ImageTooLarge"),
    "not base64": ({"json": {"data": "?!"}}, 400, "InvalidBase64"),
    "empty base64": ({"json": {"data": ""}}, 400, "EmptyInput"),
    "invalid JSON": ({"data": b'{"data": ', "headers": JSON}, 400, "InvalidJSON"),
    "a JSON name twice": ({"data": b'{"data": "aGVs", "data": "aGVs"}', "headers": JSON}, 400, "InvalidJSON"),
    "JSON NaN": ({"data": b'{"data": NaN}', "headers": JSON}, 400, "InvalidJSON"),
    "JSON null": ({"data": b"null", "headers": JSON}, 400, "UnsupportedInput"),
    "JSON list": ({"data": b"[1]", "headers": JSON}, 400, "UnsupportedInput"),
    "deep JSON": ({"data": b"[" * 100_000, "headers": JSON}, 400, "InvalidJSON"),
    "unknown JSON field": ({"json": {"image": "aGVsbG8="}}, 400, "UnknownField"),
    "unknown form field": ({"files": {"image": b"x"}}, 400, "UnknownField"),
    "no instances": ({"json": {"instances": []}}, 400, "UnsupportedInput"),
    "too many instances": ({"json": {"instances": ["aGVsbG8="] * 33}}, 413, "TooManyInstances"),
    "a bad instance": ({"json": {"instances": ["aGVsbG8="]}}, 400, "UndecodableImage"),
}
SOUNDS = {
    "empty body": ({"data": b""}, 400, "EmptyInput"),
    "header without samples": ({"data": sound(numpy.zeros(0))}, 400, "EmptyInput"),
    "half a header": ({"data": sound(numpy.zeros(10))[:20]}, 400, "UndecodableAudio"),
    "a text as sound": ({"data": b"this is no sound"}, 400, "UndecodableAudio"),
    "ten minutes": ({"data": sound(numpy.zeros(600 * 8000), 8000, kind="FLAC")}, 413, "AudioTooLong"),
    "NaN": ({"data": sound(numpy.full(16000, numpy.nan), subtype="FLOAT")}, 400, "UndecodableAudio"),
    "infinite": ({"data": sound(numpy.full(16000, numpy.inf), subtype="FLOAT")}, 400, "UndecodableAudio"),
}
TEXTS = {
    "empty body": ({"data": b""}, 400, "EmptyInput"),
    "blanks": ({"data": b" \n\t "}, 400, "EmptyInput"),
    "invalid UTF-8": ({"data": b"caf\xe9 \xff\xfe"}, 400, "UndecodableText"),
    "invalid UTF-8 that says it is text": ({"data": b"caf\xe9 \xff\xfe", "headers": TEXT}, 400, "UndecodableText"),
    "Latin-1 in a form": ({"data": b"data=caf%E9", "headers": FORM}, 400, "UndecodableText"),
    "UTF-16 without a mark": ({"data": "hello".encode("utf-16-le")}, 400, "UndecodableText"),
    "unknown charset": (
        {"data": b"hello", "headers": {"Content-Type": "text/plain; charset=x"}},
        415,
        "UnsupportedEncoding",
    ),
    "brotli": ({"data": b"hello", "headers": {**TEXT, "Content-Encoding": "br"}}, 415, "UnsupportedEncoding"),
    "brotli in JSON": ({"data": b"\x81", "headers": {**JSON, "Content-Encoding": "br"}}, 415, "UnsupportedEncoding"),
    "deflate": (
        {"data": zlib.compress(b"hello"), "headers": {"Content-Encoding": "deflate"}},
        415,
        "UnsupportedEncoding",
    ),
    "a lone surrogate": ({"data": rb'{"data": "\ud800"}', "headers": JSON}, 400, "UndecodableText"),
    "1 MB": ({"data": b"word " * 200_000}, 413, "TextTooLong"),
    "a number": ({"json": {"data": 5}}, 400, "UnsupportedInput"),
    "top_k of 0": (with_option(0), 400, "InvalidOption"),
    "top_k of -1": (with_option(-1), 400, "InvalidOption"),
    "top_k of 10^9": (with_option(10**9), 400, "InvalidOption"),
    "top_k of three": (with_option("three"), 400, "InvalidOption"),
    "top_k of true": (with_option(True), 400, "InvalidOption"),
    "top_k of 1.5": (with_option(1.5), 400, "InvalidOption"),
    "top_k of three in a form": ({"files": {"data": (None, "hello"), "top_k": (None, "three")}}, 400, "InvalidOption"),
    "a header that is not UTF-8": ({"data": b" ", "headers": {"X-Name": b"caf\xe9"}}, 400, "EmptyInput"),
}
CASES = [
    pytest.param(model, *case, id=f"{model}: {name}")
    for model, cases in {"mnist": IMAGES, "image": IMAGES, "audio": SOUNDS, "text": TEXTS}.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize(("model", "request_", "status", "error"), CASES)
def test_invalid_input_is_4xx_and_the_worker_survives(served, model, request_, status, error):
    before = worker_pids(served, model)
    response = requests.post(f"{served.client.inference}/predictions/{model}", **request_, timeout=30)
    assert (response.status_code, response.json()["type"]) == (status, error), response.text
    assert response.json()["code"] == status
    assert len(response.json()["message"]) > 20
    assert response.headers["content-type"] == "application/json"
    assert worker_pids(served, model) == before


def worker_pids(served, model: str) -> set[int]:
    workers = served.client.describe(model)["workers"]
    assert all(worker["status"] == "READY" for worker in workers)
    return {worker["pid"] for worker in workers}
