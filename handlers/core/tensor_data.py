"""Tensors as the Open Inference Protocol sends them: as JSON, or as bytes after the JSON.

Binary tensors are little-endian and in row-major order, without padding. An element of BYTES has its length before it,
as four bytes.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy

from handlers.core.errors import UnsupportedInput

BYTES, BOOL = "BYTES", "BOOL"
NUMBERS = {
    BOOL: "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
DATATYPES = (BYTES, *NUMBERS)
JSON_TYPES: dict[str, tuple[set[type], str]] = {  # by kind of NumPy's dtype: what an element may be in JSON
    "b": ({bool}, "true or false"),
    "u": ({int}, "whole numbers of at least 0"),
    "i": ({int}, "whole numbers"),
    "f": ({int, float}, "numbers"),
}
LENGTH = struct.Struct("<I")  # before each element of BYTES

Values = numpy.ndarray | list[bytes] | list[str]  # of one tensor, without its shape; BYTES are a list


def from_json(name: str, datatype: str, shape: Sequence[int], data: list) -> Values:
    """Read the elements of a tensor from JSON, where they are nested as in the shape, or flat.

    Args:
        name: of the tensor, for messages.

    Raises:
        UnsupportedInput: an element is not of the datatype, or their number is not that of the shape.
    """
    for _ in shape[1:]:
        if not data or not isinstance(data[0], list):
            break
        if set(map(type, data)) != {list}:
            raise UnsupportedInput(f'The data of "{name}" mixes lists and elements. Send a flat list of elements.')
        data = list(chain.from_iterable(data))
    check_count(name, shape, len(data))
    if datatype == BYTES:
        if not set(map(type, data)) <= {str}:
            raise UnsupportedInput(f'The data of "{name}" must be strings, because its datatype is BYTES.')
        return data
    dtype = numpy.dtype(NUMBERS[datatype])
    types, words = JSON_TYPES[dtype.kind]
    if not set(map(type, data)) <= types:
        raise UnsupportedInput(f'The data of "{name}" must be {words}, because its datatype is {datatype}.')
    try:
        with numpy.errstate(over="ignore"):  # the next check finds what becomes infinite
            values = numpy.array(data, dtype)
    except OverflowError as exc:
        raise UnsupportedInput(f'The data of "{name}" has a number that {datatype} does not have.') from exc
    check_finite(name, values)
    return values


def from_binary(name: str, datatype: str, shape: Sequence[int], content: memoryview) -> Values:
    """Read the elements of a tensor from its bytes.

    Raises:
        UnsupportedInput: there are more or fewer bytes than the shape says, or a number is not finite.
    """
    if datatype == BYTES:
        # one more than the shape says is enough to reject the rest
        elements = list(islice(split_elements(name, content), min(math.prod(shape), len(content)) + 1))
        check_count(name, shape, len(elements))
        return elements
    dtype = numpy.dtype(NUMBERS[datatype])
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise UnsupportedInput(
            f'"{name}" has {len(content)} bytes; {math.prod(shape)} elements of {datatype} are '
            f"{math.prod(shape) * dtype.itemsize} bytes."
        )
    if datatype == BOOL:
        return numpy.frombuffer(content, numpy.uint8) != 0
    values = numpy.frombuffer(content, dtype).astype(dtype.newbyteorder("="))  # a copy, which may be written
    check_finite(name, values)
    return values


def split_elements(name: str, content: memoryview) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        start = at + LENGTH.size
        if start > len(content):
            raise UnsupportedInput(f'The bytes of "{name}" end inside the length of an element.')
        at = start + LENGTH.unpack_from(content, at)[0]
        if at > len(content):
            raise UnsupportedInput(f'The bytes of "{name}" end inside an element. Each begins with its length.')
        yield bytes(content[start:at])


def to_binary(datatype: str, values: Sequence) -> bytes:
    """Return the bytes of a tensor.

    Args:
        datatype: one of `DATATYPES`.
        values: bytes if the datatype is BYTES; otherwise, numbers.
    """
    if datatype == BYTES:
        return b"".join(LENGTH.pack(len(each)) + each for each in values)
    return numpy.asarray(values, NUMBERS[datatype]).tobytes()


def check_count(name: str, shape: Sequence[int], count: int) -> None:
    if count != math.prod(shape):
        raise UnsupportedInput(
            f'"{name}" has {count} elements; the shape {list(shape)} is that of {math.prod(shape)} elements.'
        )


def check_finite(name: str, values: numpy.ndarray) -> None:
    if values.dtype.kind == "f" and not numpy.isfinite(values).all():
        raise UnsupportedInput(f'"{name}" has a number that is not finite, or too large for its datatype.')
