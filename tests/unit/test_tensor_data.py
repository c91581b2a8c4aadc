"""Tensors of the Open Inference Protocol as JSON and as bytes: every datatype, and damaged ones."""

import math
from contextlib import suppress

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handlers.core.errors import UnsupportedInput
from handlers.core.tensor_data import BYTES, DATATYPES, NUMBERS, from_binary, from_json, to_binary

shapes = arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


def tensors_of(datatype: str) -> st.SearchStrategy[numpy.ndarray]:
    finite = {"allow_nan": False, "allow_infinity": False} if datatype.startswith("FP") else {}
    dtype = numpy.dtype(NUMBERS[datatype])
    return shapes.flatmap(lambda shape: arrays.arrays(dtype, shape, elements=arrays.from_dtype(dtype, **finite)))


@pytest.mark.parametrize("datatype", NUMBERS)
@given(data=st.data())
def test_numbers_survive_json_nested_or_flat_and_bytes(datatype: str, data: st.DataObject):
    tensor = data.draw(tensors_of(datatype))
    binary = to_binary(datatype, tensor.flatten().tolist())
    assert binary == tensor.tobytes()  # as the client's NumPy writes it
    for read in (
        from_json("x", datatype, tensor.shape, tensor.tolist()),
        from_json("x", datatype, tensor.shape, tensor.flatten().tolist()),
        from_binary("x", datatype, tensor.shape, memoryview(binary)),
    ):
        assert isinstance(read, numpy.ndarray)
        assert read.dtype == tensor.dtype
        assert read.tolist() == tensor.flatten().tolist()


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_survive_as_binary_elements(values: list[bytes]):
    assert from_binary("x", BYTES, [len(values)], memoryview(to_binary(BYTES, values))) == values


@given(st.lists(st.text(max_size=20), max_size=8))
def test_strings_in_json_stay_as_they_are(values: list[str]):
    assert from_json("x", BYTES, [len(values), 1], [[each] for each in values]) == values


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=10,
)


@given(st.sampled_from(DATATYPES), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.lists(JSON_VALUES))
def test_any_json_is_read_or_rejected(datatype: str, shape: list[int], data: list):
    with suppress(UnsupportedInput):
        assert len(from_json("x", datatype, shape, data)) == math.prod(shape)


@given(st.sampled_from(DATATYPES), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.binary(max_size=40))
def test_any_bytes_are_read_or_rejected(datatype: str, shape: list[int], content: bytes):
    with suppress(UnsupportedInput):
        assert len(from_binary("x", datatype, shape, memoryview(content))) == math.prod(shape)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT8", [256]),
        ("UINT8", [-1]),
        ("INT64", [1.0]),
        ("INT64", [True]),
        ("INT32", ["1"]),
        ("FP32", ["1.5"]),
        ("FP32", [1e39]),
        ("FP16", [70000]),
        ("FP32", [10**300]),
        ("BOOL", [1]),
        ("BYTES", [1]),
        ("BYTES", [None]),
        ("FP32", [[1.0]]),
        ("FP32", [1.0, 2.0]),
        ("FP32", []),
    ],
)
def test_element_that_its_datatype_does_not_have_is_rejected(datatype: str, data: list):
    with pytest.raises(UnsupportedInput, match='"x"'):
        from_json("x", datatype, [1], data)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_binary_number_that_is_not_finite_is_rejected(number: float):
    content = numpy.array([1, number], "<f4").tobytes()
    with pytest.raises(UnsupportedInput, match="not finite"):
        from_binary("x", "FP32", [2], memoryview(content))


def test_element_longer_than_the_body_is_rejected_before_it_is_read():
    with pytest.raises(UnsupportedInput, match="inside an element"):
        from_binary("x", BYTES, [1], memoryview(b"\xff\xff\xff\xffabc"))


def test_deeply_nested_data_is_rejected_at_the_depth_of_its_shape():
    data: list = [1.0]
    for _ in range(500):
        data = [data]
    with pytest.raises(UnsupportedInput):
        from_json("x", "FP32", [1, 1], data)
