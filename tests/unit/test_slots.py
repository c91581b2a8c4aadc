"""The JSON of answers, compared with the standard library's."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.core.slots import encode_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_json_has_the_bytes_of_the_standard_library(value: object):
    assert encode_json(value) == json.dumps(value, ensure_ascii=False).encode()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.text(alphabet=st.characters()))
def test_ranking_has_the_bytes_of_the_standard_library(probability: float, label: str):
    answer = {"top_k": [{"label": label, "class": 3, "probability": probability}]}
    encoded = encode_json(answer)
    assert encoded == json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")
    assert json.loads(encoded) == answer


def test_label_leaves_as_utf8_and_a_lone_surrogate_escaped():
    assert encode_json({"label": "größe 残高"}).decode() == '{"label": "größe 残高"}'
    assert encode_json("\ud800") == b'"\\ud800"'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_rejected(number: float):
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_json({"top_k": [{"probability": number}]})


def test_value_that_json_lacks_is_rejected():
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        encode_json([{1, 2}])


def test_value_that_contains_itself_is_rejected():
    endless: list = []
    endless.append(endless)
    with pytest.raises(RecursionError):
        encode_json(endless)
