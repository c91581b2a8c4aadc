"""How answers are encoded as JSON, compared with the standard library."""

import dataclasses
import datetime
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.core.slots import encode_json, encode_strictly

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=[])),  # lone surrogates, too
    st.sampled_from([2**63, 2**64, -(2**63) - 1, "null", "größe", "\ud800", 1e-5, 1e300, 0.1 + 0.2]),
)
keys = st.one_of(st.text(max_size=4), st.integers(), st.sampled_from(["\udc00", "null"]))
answers = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)


@given(answers)
def test_answer_is_encoded_as_the_standard_library_encodes_it(answer: object):
    try:
        expected = json.loads(encode_strictly(answer))
    except ValueError:
        with pytest.raises(ValueError, match="JSON compliant"):
            encode_json(answer)
        return
    encoded = json.loads(encode_json(answer))
    assert encoded == expected
    assert repr(encoded) == repr(expected)  # 1 == 1.0 == True


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", [None, "text"])
def test_number_that_is_not_finite_is_an_error(number: float, beside: object):
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_json({"beside": beside, "list": [1.0, number]})


@dataclasses.dataclass
class Record:
    number: int = 1


@pytest.mark.parametrize(
    "value", [Record(), datetime.date(2026, 1, 1), b"bytes", {1, 2}], ids=lambda value: type(value).__name__
)
def test_value_that_is_not_json_is_an_error(value: object):
    with pytest.raises(TypeError):
        encode_json({"value": value})


def test_answer_nested_more_deeply_than_orjson_encodes():
    answer: object = 1
    for _ in range(300):
        answer = [answer]
    assert json.loads(encode_json(answer)) == answer
