"""Parse JSON as the standard (RFC 8259) defines it. Python's parser accepts more, and hides a mistake of the client."""

import json
import math
from typing import NoReturn

LONGEST_NUMBER = 308  # digits of a whole number that is finite as a float


def parse_json(text: bytes | bytearray | str) -> object:
    """Parse a JSON document, in UTF-8, UTF-16 or UTF-32 if it is bytes.

    Raises:
        ValueError: it is not JSON or not in one of these encodings, a number is not finite as a float (NaN, Infinity,
            1e999), or an object has a name twice. The message quotes no value.
        RecursionError: it is nested too deeply.
    """
    if not isinstance(text, str):
        try:
            text = text.decode(json.detect_encoding(text))
        except UnicodeDecodeError as exc:
            raise ValueError("it is not valid UTF-8") from exc
    return decoder.decode(text.removeprefix("\ufeff"))


def bounded(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError("a number is too large")
    return int(digits)


def finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a name twice")
    return fields


decoder = json.JSONDecoder(parse_float=finite, parse_int=bounded, parse_constant=not_a_number, object_pairs_hook=unique)
