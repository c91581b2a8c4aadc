"""What the query and the headers say about a request: options, the charset, the compression."""

import base64
import json
import re

import pytest

from handlers.core import inputs
from handlers.core.errors import (
    InvalidJSON,
    InvalidOption,
    RepeatedField,
    UndecodableText,
    UnknownField,
    UnsupportedEncoding,
)
from handlers.core.request import Repeated, Request, RequestReader
from tests.unit.readers import (
    JSON,
    MAX_INSTANCES,
    Detection,
    OneImage,
    OneText,
    houses,
    images,
    request_for,
    several,
    texts,
)

# --- options in the query of the URL ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"body": bytearray(b"hello")},
        {"body": "hello"},
        {"body": {"data": "hello"}},
        {"data": bytearray(b"hello")},
    ],
)
@pytest.mark.parametrize("query", ["top_k=2", "top%5Fk=%32&", "&top_k=2"])
def test_option_in_the_query_is_read_with_every_form_of_a_request(row: dict, query: str):
    assert texts.read(row, {"bundle-query": query}) == request_for("hello", top_k=2)


def test_options_of_the_query_and_of_the_body_are_read_together():
    row = {"image": b"hello", "caption": "a dog", "crowd": "true"}
    options = several.read(row, {"bundle-query": "method=exact&score_threshold=0.25"}).options
    assert options == Detection(method="exact", score_threshold=0.25, crowd=True)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("topk=2", UnknownField, 'Unknown query parameter "topk". Accepted in the query: "top_k".'),
        ("data=hello", UnknownField, "Send inputs in the body"),
        ("top_k", InvalidOption, "whole number"),
        ("top_k=0", InvalidOption, "whole number"),
        ("top_k=1&top_k=2", RepeatedField, '"top_k" twice'),
        ("a" * 4000, UnknownField, r'"a{40}\.\.\."'),
    ],
)
def test_invalid_query_is_rejected_with_its_reason(query: str, error: type, message: str):
    with pytest.raises(error, match=message):
        texts.read({"body": "hello"}, {"bundle-query": query})


def test_option_in_the_query_and_in_the_body_is_rejected():
    with pytest.raises(RepeatedField, match='"top_k" is in the query and in the body'):
        texts.read({"body": {"data": "a", "top_k": 1}}, {"bundle-query": "top_k=1"})


def test_query_of_a_model_without_options_is_rejected():
    with pytest.raises(UnknownField, match="This model has no options"):
        houses.read({"body": {"data": {"rooms": 2, "area": 50}}}, {"bundle-query": "top_k=1"})


def test_picture_is_chosen_in_the_query_of_a_raw_body():
    reader = RequestReader(OneText, inputs.PictureOptions, MAX_INSTANCES)
    assert reader.read({"body": "a"}, {"bundle-query": "format=png"}).options.format == "png"


# --- charsets and compression --------------------------------------------------------------------------------------

GREETING = "größe"


def declared(charset: str, media_type: str = "text/plain") -> dict[str, str]:
    return {"content-type": f"{media_type}; format=flowed; Charset={charset}"}


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("iso-8859-1", GREETING),
        ('"Latin1"', GREETING),
        ("windows-1252", GREETING),
        ("UTF-16", GREETING),
        ("utf-16le", GREETING),
        ("koi8-r", "размер"),
        ("windows-1251", "размер"),
        ("Shift_JIS", "残高"),
        ("x-sjis", "残高"),
        ("iso-2022-jp", "残高"),
        ("gb2312", "余额"),
        ("utf-8", GREETING),
        ("binary", GREETING),
    ],
)
def test_text_is_decoded_in_the_charset_of_its_content_type(charset: str, text: str):
    codec = {"x-sjis": "shift_jis", "binary": "utf-8", "utf-16le": "utf-16-le"}.get(charset, charset.strip('"'))
    content = bytearray(text.encode(codec))
    sent = [content]
    try:
        sent.append(content.decode())  # what TorchServe makes of text/*, whatever its charset is
    except UnicodeError:
        pass
    for each in sent:
        assert texts.read({"body": each}, declared(charset)) == request_for(text)


@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16"])
def test_json_is_decoded_in_the_charset_of_its_content_type(charset: str):
    content = bytearray(json.dumps({"data": GREETING}, ensure_ascii=False).encode(charset))
    assert texts.read({"body": content}, declared(charset, "application/json")) == request_for(GREETING)


@pytest.mark.parametrize("charset", ["klingon", "punycode", "unicode_escape", "idna", "utf-7", "zlib", "..", "x" * 99])
def test_unknown_charset_is_rejected_by_its_name(charset: str):
    with pytest.raises(
        UnsupportedEncoding, match=r"charset .{3,50}is not supported. Encode the text as UTF-8"
    ) as found:
        texts.read({"body": "hello"}, declared(charset))
    assert found.value.code == 415


def test_text_that_is_not_in_its_charset_is_rejected():
    with pytest.raises(UndecodableText, match="not valid us-ascii, the charset of its Content-Type"):
        texts.read({"body": GREETING}, declared("US-ASCII"))
    with pytest.raises(UndecodableText, match="charset=iso-8859-1"):
        texts.read({"body": bytearray(GREETING.encode("latin-1"))}, {"content-type": "text/plain"})


def test_charset_of_a_file_that_is_no_text_is_ignored():
    file = {"content-type": "image/png; charset=binary"}  # as `file --mime` prints it
    assert images.read({"body": bytearray(b"\xff\0")}, file).inputs == [OneImage(data=b"\xff\0")]


URLENCODED = "application/x-www-form-urlencoded"


def test_form_is_decoded_in_the_charset_of_its_content_type():
    """Apache's HttpClient sends forms in ISO-8859-1 by default."""
    field = bytearray(GREETING.encode("latin-1"))
    headers = declared("ISO-8859-1", URLENCODED)
    assert texts.read({"data": field, "top_k": bytearray(b"2")}, headers) == request_for(GREETING, top_k=2)
    assert texts.read({"data": Repeated([field, field])}, headers) == request_for(GREETING, GREETING, many=True)
    with pytest.raises(UndecodableText):
        texts.read({"data": field}, {"content-type": URLENCODED})


def test_json_in_a_form_is_decoded_in_the_charset_of_its_content_type():
    class Named(inputs.Inputs):
        data: dict[str, str]

    class Greeting(inputs.Options):
        word: str = ""

    reader = RequestReader(Named, Greeting, MAX_INSTANCES)
    name, word = f'{{"name": "{GREETING}"}}'.encode("latin-1"), GREETING.encode("latin-1")
    form = {"data": bytearray(name), "word": bytearray(word)}
    expected = Request([Named(data={"name": GREETING})], Greeting(word=GREETING))
    assert reader.read(form, declared("ISO-8859-1", URLENCODED)) == expected
    instances = {"instances": bytearray(b"[" + name + b"]")}
    assert reader.read(instances, declared("ISO-8859-1", URLENCODED)).inputs == expected.inputs
    with pytest.raises(InvalidJSON, match="invalid JSON: it is not valid UTF-8"):
        reader.read(form, {"content-type": URLENCODED})


@pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("length", [100, 101])
def test_base64_that_torchserve_takes_for_a_form_is_read_as_a_raw_body(before: str, length: int):
    """`curl -d` calls every body a form, and the padding separates a name from its value."""
    content = bytes(range(120, 120 + length))
    name, value = (before + base64.b64encode(content).decode()).split("=", 1)
    row = {name.replace("+", " "): bytearray(value.encode())}
    assert images.read(row, {"content-type": URLENCODED}).inputs == [OneImage(data=content)]
    with pytest.raises(UnknownField):
        images.read(row, {"content-type": "multipart/form-data"})
    with pytest.raises(UnknownField):
        texts.read(row, {"content-type": URLENCODED})


@pytest.mark.parametrize("encoding", ["br", "Deflate", "zstd", "gzip, br", "x" * 99])
def test_compressed_body_is_rejected_by_the_name_of_its_encoding(encoding: str):
    for row in ({"body": bytearray(b"x")}, {"data": bytearray(b"x")}, {}):
        with pytest.raises(UnsupportedEncoding, match=re.escape(encoding.lower()[:20])) as found:
            texts.read(row, {"Content-encoding": encoding, **JSON})
        assert (found.value.code, "with gzip" in str(found.value)) == (415, True)


def test_identity_encoding_is_accepted():
    assert texts.read({"body": "hello"}, {"content-encoding": "identity"}) == request_for("hello")
