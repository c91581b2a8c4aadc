"""Declare the inputs and options of a handler.

    class Inputs(inputs.Inputs):
        data: Image                      # a field of this name; as the only input, it may also be the raw body

    class Options(inputs.Options):
        score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

The fields are defined only here. Reading, error messages and the cache's key are derived from these two classes.
"""

import base64
import binascii
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from handlers.core.errors import EmptyInput, InvalidBase64, RequestError
from handlers.core.texts import read_text


class Inputs(BaseModel):
    """The inputs of one sample.

    A field with a `Kind` is sent as bytes or as a string. Any other field is sent as JSON of its type, such as
    `dict[str, float]` or a pydantic model. Give long lists `Field(fail_fast=True)`: pydantic makes an error for each
    invalid entry, and a request of 16 MiB can have millions. Numbers are finite; a pydantic model inside needs
    `ConfigDict(allow_inf_nan=False)` for that, because pydantic reads the string "nan" as a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Options(BaseModel):
    """The options of a request. Every option has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PictureOptions(Options):
    """The options of a handler whose answer may be a picture. Only a request with a single sample may ask for one."""

    format: Annotated[Literal["json", "png"], Field(description="Of the answer: JSON, or a picture.")] = "json"


STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
BASE64_CHARACTERS = (string.ascii_letters + string.digits + "+/-_=" + string.whitespace).encode()
BASE64_DATA_URL = re.compile(rb"\s*data:[^,]{0,200};base64,", re.IGNORECASE)
ASCII_PPM = re.compile(rb"P[123]\s")  # its pixels are written in digits
SHORTEST_FILE = 32  # characters of base64; every image and sound file has more


def binary(value: bytes | str) -> bytes:
    """Return the bytes of a binary input: sent as bytes, or as base64, also within a data: URL.

    Raises:
        InvalidBase64: `value` is a string or a data: URL, but not base64.
        EmptyInput: the base64 string encodes no bytes.
    """
    sent = value.encode("ascii", "replace") if isinstance(value, str) else value
    url = BASE64_DATA_URL.match(sent)
    if isinstance(value, bytes) and not url and not is_base64(value):
        return value
    encoded = sent[url.end() :] if url else sent
    if isinstance(value, bytes):
        # the decoder of forms makes a blank of each plus sign that is not percent-encoded, also of the last one
        encoded = encoded.strip(b"\r\n\t").replace(b" ", b"+")
    decoded = decode_base64(encoded)
    if not decoded:
        raise EmptyInput("The base64 string encodes no bytes. Send the file's bytes, or base64 of them.")
    return decoded


def is_base64(content: bytes) -> bool:
    """Return whether bytes are base64, as a form field may have it, and not a file."""
    for part in (content[:SHORTEST_FILE], content):  # the start of a file usually decides
        if part.translate(None, BASE64_CHARACTERS):
            return False
    return len(content) >= SHORTEST_FILE and not ASCII_PPM.match(content)


def decode_base64(encoded: bytes) -> bytes:
    """Decode base64 in either alphabet, in lines or not, with or without the padding at its end.

    Raises:
        InvalidBase64: it is not base64.
    """
    encoded = b"".join(encoded.split()).translate(STANDARD_ALPHABET)
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as exc:
        raise InvalidBase64("The input is a string, but not base64. Send the file's bytes, or base64 of them.") from exc


@dataclass(frozen=True)
class Kind:
    """A kind of input that is sent as bytes or as a string.

    Attributes:
        name: of the kind.
        read: (bytes or str, never empty) -> the field's value; raises a RequestError.
    """

    name: str
    read: Callable[[bytes | str], bytes | str]


Image = Annotated[bytes, Kind("image", binary)]
Sound = Annotated[bytes, Kind("sound", binary)]
Text = Annotated[str, Kind("text", read_text)]


@contextmanager
def in_field(name: str) -> Iterator[None]:
    """Say in the message of an error which field of the request is at fault.

    Raises:
        RequestError: of the same class as the one that was raised in the block.
    """
    try:
        yield
    except RequestError as error:
        raise type(error)(f'In the field "{name}": {error}') from error


def kind_of(field: FieldInfo) -> Kind | None:
    """Return the kind that a field of `Inputs` declares, or None for JSON.

    Raises:
        TypeError: a kind is inside of another type, such as `list[Image]`, where nothing would decode the base64.
    """
    choices = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    nested = [entry for each in choices for entry in get_args(each)]  # of `Image | None`
    kind = next((entry for entry in [*field.metadata, *nested] if isinstance(entry, Kind)), None)
    if kind is None and (inner := next(kinds_within(field.annotation), None)):
        raise TypeError(
            f"{field.annotation} has the kind {inner.name} inside. Declare strings instead, and decode them in `decode`"
        )
    return kind


def kinds_within(annotation: object) -> Iterator[Kind]:
    for argument in get_args(annotation):
        if isinstance(argument, Kind):
            yield argument
        yield from kinds_within(argument)


def describe_option(field: FieldInfo) -> str:
    """Return which values an option accepts, for an error message: "a whole number of at least 1"."""
    return describe_type(field.annotation, field.metadata)


def describe_type(annotation: object, metadata: list | tuple) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [entry for extra in arguments[1:] for entry in getattr(extra, "metadata", [extra])]
        return describe_type(arguments[0], [*metadata, *inner])
    if origin in (Union, UnionType):
        return " or ".join(describe_type(each, metadata) for each in arguments if each is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    names: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(annotation, "valid") + describe_bounds(metadata, whole=annotation is int)


def describe_bounds(metadata: list | tuple, whole: bool) -> str:
    """Return the constraints of annotated_types in words: " of at least 1", " from 0 to 1"."""
    bounds = {
        name: getattr(entry, name) for entry in metadata for name in ("ge", "gt", "le", "lt") if hasattr(entry, name)
    }
    if whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if whole and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    if {"ge", "le"} <= bounds.keys():
        return f" from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"ge": " of at least", "gt": " above", "le": " of at most", "lt": " below"}
    return "".join(f"{words[name]} {value:g}" for name, value in bounds.items())
