"""One TorchServe row -> the inputs of one request and its options.

What TorchServe hands over (0.12.0): a raw body is {"body": value}, a form is {field: value, ...}. JSON arrives parsed
and text/* as str, unless they do not parse: then, like everything else, as bytearray.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass

from handlers.core.errors import (
    EmptyInput,
    InvalidBase64,
    InvalidJSON,
    InvalidOption,
    MissingField,
    TooManyInstances,
    UnknownField,
    UnsupportedInput,
)
from handlers.core.headers import content_type

Content = bytes | str

DATA, INSTANCES, TOP_K = "data", "instances", "top_k"
ACCEPTED = (
    'Accepted: the input as raw body, as form field "data", or as JSON {"data": ...} or {"instances": [...]} '
    '(with Content-Type: application/json); optionally with "top_k".'
)


@dataclass(frozen=True)
class Request:
    """The inputs of one request.

    Attributes:
        contents: one entry an input, as it was sent: bytes, or str (text, or base64 for what is binary).
        many: whether the inputs came as {"instances": [...]}, to be answered as {"predictions": [...]}.
        top_k: the number of classes that the request asks for, or None.
    """

    contents: list[Content]
    many: bool = False
    top_k: int | None = None


def read(row: Mapping, headers: Mapping, max_instances: int) -> Request:
    """Reads one row of a batch.

    Args:
        row: {field: value}, as TorchServe's worker gives it.
        headers: the request's own headers.
        max_instances: how many inputs one request may bring.

    Raises:
        MalformedRequest: the request is not wrapped as `ACCEPTED` says.
        TooManyInstances: more than `max_instances` inputs.
    """
    if row.keys() == {"body"}:
        body = row["body"]
        if isinstance(body, (bytes, bytearray)) and content_type(headers) == "application/json":
            body = parse_json(body)
        if isinstance(body, dict):
            return read_fields(body, max_instances)
        return Request([read_content(body)])
    if not row and content_type(headers) == "application/x-www-form-urlencoded":
        # what curl -d sends by itself
        raise UnsupportedInput(f"The request is sent as a form and holds no fields. {ACCEPTED}")
    if not row:
        raise EmptyInput(f"The request has no body. {ACCEPTED}")
    return read_fields(row, max_instances)


def read_fields(fields: Mapping, max_instances: int) -> Request:
    if unknown := [name for name in fields if name not in (DATA, INSTANCES, TOP_K)]:
        raise UnknownField(f"Unknown field {shorten(unknown[0])}. {ACCEPTED}")
    if (DATA in fields) == (INSTANCES in fields):
        raise MissingField(f'Exactly one of the fields "data" and "instances" is needed. {ACCEPTED}')
    top_k = read_top_k(fields[TOP_K]) if TOP_K in fields else None
    if DATA in fields:
        return Request([read_content(fields[DATA])], top_k=top_k)
    instances = fields[INSTANCES]
    if isinstance(instances, (bytes, bytearray)):
        instances = parse_json(instances)
    if not isinstance(instances, list) or not instances:
        raise UnsupportedInput('"instances" must be a list of at least one input.')
    if len(instances) > max_instances:
        raise TooManyInstances(f"{len(instances)} instances in one request; at most {max_instances} are accepted.")
    return Request([read_instance(instance) for instance in instances], many=True, top_k=top_k)


def read_instance(instance: object) -> Content:
    """An instance is an input, or {"data": input}."""
    if isinstance(instance, dict):
        if set(instance) != {DATA}:
            raise UnknownField('An instance is an input, or an object with the one field "data".')
        instance = instance[DATA]
    return read_content(instance)


def read_content(value: object) -> Content:
    if isinstance(value, (bytearray, memoryview)):
        value = bytes(value)
    if not isinstance(value, (bytes, str)):
        raise UnsupportedInput(f"An input must be bytes or a string, not a JSON {json_type(value)}. {ACCEPTED}")
    if not value:
        raise EmptyInput(f"The input is empty. {ACCEPTED}")
    return value


def read_top_k(value: object) -> int:
    """A positive whole number, as JSON number or as the text of a form field."""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and len(value) < 20:
        try:
            value = int(value)
        except ValueError:
            pass
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidOption("top_k must be a whole number of at least 1.")
    return value


def parse_json(text: bytes | bytearray) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidJSON(f"The request says that it is JSON and does not parse as JSON. {ACCEPTED}") from exc


def binary(content: Content) -> bytes:
    """The bytes of an input that is binary by nature: as they were sent, or out of base64 (a data: URL, too).

    Raises:
        InvalidBase64: `content` is text and not base64.
    """
    if isinstance(content, bytes):
        return content
    encoded = content.split(",", 1)[1] if content.startswith("data:") and "," in content else content
    try:
        decoded = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidBase64("The input is text and not base64. Send the file's bytes, or base64 of them.") from exc
    if not decoded:
        raise EmptyInput("The base64 text holds no bytes.")
    return decoded


def json_type(value: object) -> str:
    names = {dict: "object", list: "array", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


def shorten(name: object, limit: int = 40) -> str:
    text = str(name)
    return repr(text if len(text) <= limit else text[:limit] + "...")
