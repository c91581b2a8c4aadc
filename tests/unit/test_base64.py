"""Binary inputs as bytes, and as base64."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.core.errors import EmptyInput, InvalidBase64
from handlers.core.inputs import binary


@given(st.binary(min_size=1), st.sampled_from(["{}", "data:image/png;base64,{}", "  {}\n", "data:;base64, {}\r\n"]))
def test_base64_decodes_to_the_encoded_bytes(content: bytes, wrapping: str):
    for encode in (base64.b64encode, base64.encodebytes):  # one line; lines of 76 characters
        assert binary(wrapping.format(encode(content).decode())) == content


@given(st.binary())
def test_bytes_are_returned_unchanged(content: bytes):
    assert binary(content) is content


@pytest.mark.parametrize(
    "text", ["not base64!", "aGVsbG8", "aGVs*G8=", "aGVsbG8=aGVsbG8=", "é", "\ud800", "data:image/png", "data:,%00"]
)
def test_invalid_base64_is_rejected(text: str):
    with pytest.raises(InvalidBase64, match="bytes, or base64"):
        binary(text)


@pytest.mark.parametrize("text", [" ", "data:image/png;base64,"])
def test_base64_without_content_is_rejected_as_empty(text: str):
    with pytest.raises(EmptyInput):
        binary(text)


@given(st.text())
def test_any_text_is_decoded_or_rejected(text: str):
    try:
        assert binary(text)
    except (InvalidBase64, EmptyInput):
        pass
