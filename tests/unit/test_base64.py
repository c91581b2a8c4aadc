"""Binary inputs as bytes, and as base64."""

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.core.errors import EmptyInput, InvalidBase64
from handlers.core.inputs import binary


@given(st.binary(min_size=1), st.sampled_from(["{}", "data:image/png;base64,{}", "  {}\n", "data:;base64, {}\r\n"]))
def test_base64_decodes_to_the_encoded_bytes(content: bytes, wrapping: str):
    for encode in (base64.b64encode, base64.encodebytes):  # one line; lines of 76 characters
        assert binary(wrapping.format(encode(content).decode())) == content


FILE = bytes(range(256))  # its base64 has both letters that differ between the alphabets
URL_SAFE = base64.urlsafe_b64encode(FILE)
WRAPPINGS = ["{}", "data:image/png;base64,{}", "DATA:Image/PNG;name=a.png;BASE64,{}", "{}\r\n", " data:;base64,{}"]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("encoded", [base64.b64encode(FILE), base64.encodebytes(FILE), URL_SAFE, URL_SAFE.rstrip(b"=")])
@pytest.mark.parametrize("kind", [str, bytes])
def test_base64_of_any_dialect_is_decoded_from_a_string_and_from_a_form_field(
    wrapping: str, encoded: bytes, kind: type
):
    text = wrapping.format(encoded.decode())
    assert binary(text if kind is str else text.encode()) == FILE


def test_base64_whose_plus_signs_a_form_has_replaced_by_blanks_is_decoded():
    encoded = base64.b64encode(FILE)
    assert b"+" in encoded
    assert binary(encoded.replace(b"+", b" ")) == FILE
    assert binary(b"data:image/png;base64," + encoded.replace(b"+", b" ")) == FILE


@pytest.mark.parametrize("file", [b"\xf8" + bytes(range(31)) + b"\x3e", bytes(range(32)) + b"\x3e"])
def test_base64_that_begins_or_ends_with_a_blank_for_a_plus_sign_keeps_every_byte(file: bytes):
    encoded = base64.b64encode(file)
    assert b"+" in encoded[:1] + encoded[-1:]
    assert binary(encoded.replace(b"+", b" ")) == file


@given(st.binary())
def test_bytes_are_returned_unchanged(content: bytes):
    file = b"\x89PNG" + content
    assert binary(file) is file


@pytest.mark.parametrize(
    "file", [b"P3\n4 2\n255\n" + b"0 0 0 255 255 255\n" * 4, b"hello", b"", b"data:image/png,abc", "größe".encode()]
)
def test_bytes_of_text_that_are_no_base64_are_returned_unchanged(file: bytes):
    assert binary(file) is file


@pytest.mark.parametrize("shape", [b" %s!", b"%s\n!", b"AAAA" * 4 + b"\n%s!"])
def test_bytes_that_resemble_base64_are_read_once(shape: bytes):
    """A search that goes back at each line would take minutes for 16 MiB."""
    file = shape % (b"AAAA\n" * 3_000_000)
    start = time.process_time()
    assert binary(file) is file
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text", ["not base64!", "aGVsb", "aGVs*G8=", "aGVsbG8=aGVsbG8=", "é", "\ud800", "data:image/png", "data:,%00"]
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
