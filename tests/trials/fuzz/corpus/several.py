"""Generate requests with several inputs in JSON: a picture of a digit, its name in a text, and sounds."""

import base64
import json

from models.avdigits.phrases import NAMES
from tests.trials.fuzz.corpus.images import images
from tests.trials.fuzz.corpus.sounds import sounds
from tests.unit.inputs import DIGITS, draw_digit, encode_image


def clear() -> dict[str, bytes]:
    """Return requests with a picture, a text or both, which name the same digit."""
    found = {}
    for digit in DIGITS:
        picture, text = encode_image(draw_digit(digit), "PNG"), f"it is a {NAMES[digit]}"
        found[f"picture of {digit}"] = body(image=picture)
        found[f"text about {digit}"] = body(text=text)
        found[f"picture and text of {digit}"] = body(image=picture, text=text)
    return found


def several() -> dict[str, bytes]:
    """Return requests with every combination of the inputs, in several formats, valid and not."""
    sound, picture = sounds(), images()
    everything = {"image": encode_image(draw_digit(7), "PNG"), "text": "seven", "audio": sound["wav pcm_16"]}
    return {
        "all": body(**everything),
        "picture and sound": body(image=everything["image"], audio=sound["ogg vorbis"]),
        "text and sound": body(text="number 7", audio=sound["flac pcm_16"]),
        "sound": body(audio=sound["stereo 44.1 kHz"]),
        "picture": body(image=picture["jpeg"]),
        "text": body(text="7"),
        "long text": body(text="7 " * 100),
        "text past the limit": body(text="7" * 201),
        "large picture": body(**everything | {"image": picture["png at the limit"]}),
        "picture past the limit": body(**everything | {"image": picture["png past the limit"]}),
        "a minute": body(**everything | {"audio": sound["a minute"]}),
        "ten minutes": body(**everything | {"audio": sound["ten minutes"]}),
        "not a number": body(**everything | {"audio": sound["not a number"]}),
        "no samples": body(**everything | {"audio": sound["no samples"]}),
        "nothing": body(),
    }


def body(**fields: bytes | str) -> bytes:
    """Return JSON: a text as it is, and files as data: URLs."""
    return json.dumps(
        {name: value if isinstance(value, str) else url(value) for name, value in fields.items()}
    ).encode()


def url(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
