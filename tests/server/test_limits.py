"""Every limit of a request: an input at the limit is served, and one past the limit gets its 4xx."""

import base64
import io
import json

import numpy
import pytest
import requests
import soundfile
from PIL import Image

from handlers.core.image_parts import count_segments

JSON = {"Content-Type": "application/json"}
BODY = 16 << 20
SENTENCE = "where is my luggage"
FACE = "\U0001f600".encode()


def picture(width: int, height: int, format: str = "PNG") -> bytes:
    """Return a bright bar on black, which MNIST accepts as a digit."""
    image = Image.new("1", (width, height))
    image.paste(1, (width // 2 - max(1, width // 20), height // 4, width // 2, height - height // 4))
    return encoded(image, format)


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def slow_picture(width: int, height: int) -> bytes:
    """Return a PGM with the maximum 254, which Pillow scales in Python."""
    dark, bright = bytes(width // 2), b"\xfe" * (width - width // 2)
    return b"P5 %d %d 254\n" % (width, height) + (dark + bright) * height


def scans(count: int) -> bytes:
    """Return a progressive JPEG with `count` scans: its last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 100).save(file, "JPEG", progressive=True)
    content = file.getvalue()[:-2]
    last = content[content.rindex(b"\xff\xda") :]
    return content + last * (count - content.count(b"\xff\xda")) + b"\xff\xd9"


def segments(count: int) -> bytes:
    """Return a JPEG with `count` segments. Most are empty, and follow its scan."""
    content = encoded(Image.new("L", (64, 64), 100), "JPEG")[:-2]
    present, _ = count_segments(content, count)
    return content + b"\xff\xe1\0\2" * (count - present) + b"\xff\xd9"


def sound(frames: int, rate: int = 16_000, channels: int = 1, format: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, numpy.zeros((frames, channels), dtype=numpy.int16), rate, format=format)
    return file.getvalue()


def instances(count: int) -> bytes:
    return json.dumps({"instances": [SENTENCE] * count}).encode()


def top_k(count: int, data: str = SENTENCE) -> bytes:
    return json.dumps({"data": data, "top_k": count}).encode()


def nested(*wrappers: str) -> bytes:
    """Return `hello` in nested lists ("[") and objects ("{")."""
    node: object = "hello"
    for wrapper in reversed(wrappers):
        node = [node] if wrapper == "[" else {"data": node}
    return json.dumps({"instances": node}).encode()


def image_in_json(width: int, height: int) -> bytes:
    return json.dumps({"data": base64.b64encode(picture(width, height)).decode()}).encode()


# model, headers, input at the limit, input past the limit, status and type of the rejection
LIMITS = {
    "pixels": ("image", {}, picture(10_000, 5_000), picture(50_000_001, 1), 413, "ImageTooLarge"),
    "pixels of a digit": ("mnist", {}, picture(10_000, 5_000), picture(50_000_001, 1), 413, "ImageTooLarge"),
    "pixels in JSON": ("image", JSON, image_in_json(10_000, 5_000), image_in_json(10_000, 5_001), 413, "ImageTooLarge"),
    "slow pixels": ("image", {}, slow_picture(2_000, 1_000), slow_picture(2_000, 1_001), 413, "ImageTooLarge"),
    "scans": ("image", {}, scans(100), scans(101), 413, "ImageTooLarge"),
    "parts": ("image", {}, segments(20_000), segments(20_001), 413, "ImageTooLarge"),
    "shorter side": ("image", {}, picture(40, 8), picture(40, 7), 400, "UndecodableImage"),
    "seconds": ("audio", {}, sound(60 * 16_000), sound(60 * 16_000 + 1), 413, "AudioTooLong"),
    "values": ("audio", {}, sound(4_000_000, 384_000, 8), sound(4_000_001, 384_000, 8), 413, "AudioTooLong"),
    "lowest rate": ("audio", {}, sound(1000, 1_000), sound(1000, 999), 400, "UndecodableAudio"),
    "highest rate": (
        *("audio", {}, sound(1000, 384_000, format="WAV"), sound(1000, 384_001, format="WAV")),
        *(400, "UndecodableAudio"),
    ),
    "characters": ("text", {}, b"word " * 2000, b"word " * 2000 + b"x", 413, "TextTooLong"),
    "characters of four bytes": (
        *("text", {}, b"hello " + FACE * 9_994, b"hello " + FACE * 9_995),
        *(413, "TextTooLong"),
    ),
    "instances": ("text", JSON, instances(32), instances(33), 413, "TooManyInstances"),
    "depth": ("text", JSON, nested("[", "{"), nested("[", "{", "["), 400, "UnsupportedInput"),
    "top_k": ("text", JSON, top_k(151), top_k(152), 400, "InvalidOption"),
    "top_k of a digit": (
        *("mnist", JSON, top_k(3, base64.b64encode(picture(28, 28)).decode())),
        *(top_k(4, base64.b64encode(picture(28, 28)).decode()), 400, "InvalidOption"),
    ),
    "least top_k": ("text", JSON, top_k(1), top_k(0), 400, "InvalidOption"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_input_at_the_limit_is_served_and_past_it_is_rejected(served, limit: str):
    model, headers, at, past, status, error = LIMITS[limit]
    url = f"{served.client.inference}/predictions/{model}"
    accepted, rejected = (requests.post(url, data=content, headers=headers, timeout=60) for content in (at, past))
    assert accepted.status_code == 200, accepted.text
    assert (rejected.status_code, rejected.json()["type"]) == (status, error), rejected.text


@pytest.mark.parametrize("chunked", [False, True])
def test_body_at_the_limit_is_served_and_past_it_is_rejected(served, chunked: bool):
    """The body is an image with padding. Past the limit, TorchServe's frontend answers."""
    content = picture(64, 64, "JPEG" if chunked else "PNG").ljust(BODY, b"\0")

    def post(body: bytes) -> requests.Response:
        sent = iter([body[: BODY // 2], body[BODY // 2 :]]) if chunked else body
        return requests.post(f"{served.client.inference}/predictions/image", data=sent, timeout=60)

    assert post(content).status_code == 200
    rejected = post(content + b"\0")
    assert (rejected.status_code, rejected.json()["type"]) == (413, "BodyTooLarge")
