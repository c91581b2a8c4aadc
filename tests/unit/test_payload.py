"""How a request may be wrapped, and what is answered where it is wrapped otherwise."""

import base64
import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.core import errors, payload
from handlers.core.errors import (
    EmptyInput,
    InputTooLarge,
    InvalidBase64,
    InvalidJSON,
    InvalidOption,
    MalformedRequest,
    MissingField,
    TooManyInstances,
    UnknownField,
    UnsupportedInput,
)
from handlers.core.payload import Request, binary, read

MAX_INSTANCES = 4
JSON = {"Content-Type": "application/json; charset=utf-8"}  # TorchServe parses none that names a charset
TEXT = "aGVsbG8="  # base64 of b"hello"


def body(value: object) -> bytearray:
    """JSON that TorchServe has left as it came."""
    return bytearray(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("row", "headers", "request_read"),
    [
        pytest.param({"body": bytearray(b"\xff\0")}, {}, Request([b"\xff\0"]), id="raw"),
        pytest.param({"body": memoryview(b"\xff\0")}, {}, Request([b"\xff\0"]), id="raw-view"),
        pytest.param({"body": "hello"}, {"Content-Type": "text/plain"}, Request(["hello"]), id="text"),
        pytest.param({"body": "hello"}, {"Content-Type": "application/json"}, Request(["hello"]), id="json-string"),
        pytest.param({"body": bytearray(b'{"a":')}, {}, Request([b'{"a":']), id="raw-is-not-guessed-to-be-json"),
        pytest.param({"body": {"data": TEXT}}, {}, Request([TEXT]), id="json"),
        pytest.param({"body": {"data": TEXT, "top_k": 2}}, {}, Request([TEXT], top_k=2), id="json-top-k"),
        pytest.param({"body": body({"data": TEXT})}, JSON, Request([TEXT]), id="json-with-charset"),
        pytest.param({"body": body("hello")}, {"content-TYPE": " Application/JSON"}, Request(["hello"]), id="header"),
        pytest.param({"data": bytearray(b"\xff")}, {}, Request([b"\xff"]), id="form"),
        pytest.param({"data": "hello", "top_k": bytearray(b"3")}, {}, Request(["hello"], top_k=3), id="form-top-k"),
        pytest.param({"body": {"instances": ["a", "b"]}}, {}, Request(["a", "b"], many=True), id="instances"),
        pytest.param({"body": {"instances": [{"data": "a"}, "b"]}}, {}, Request(["a", "b"], many=True), id="objects"),
        pytest.param(
            {"instances": body(["a"]), "top_k": "1"}, {}, Request(["a"], many=True, top_k=1), id="form-instances"
        ),
    ],
)
def test_reads(row: dict, headers: dict, request_read: Request):
    assert read(row, headers, MAX_INSTANCES) == request_read


NAMES_THE_ACCEPTED = re.escape(payload.ACCEPTED)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        pytest.param({}, EmptyInput, NAMES_THE_ACCEPTED, id="nothing"),
        pytest.param({"body": bytearray()}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-body"),
        pytest.param({"body": ""}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-text"),
        pytest.param({"data": bytearray()}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-field"),
        pytest.param({"body": {"data": ""}}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-string"),
        pytest.param({"body": {"instances": ["a", ""]}}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-instance"),
        pytest.param({"body": []}, UnsupportedInput, "not a JSON array", id="array"),
        pytest.param({"body": None}, UnsupportedInput, "not a JSON null", id="null"),
        pytest.param({"body": False}, UnsupportedInput, "not a JSON boolean", id="boolean"),
        pytest.param({"body": {"data": 0}}, UnsupportedInput, "not a JSON number", id="number"),
        pytest.param({"body": {"data": {"b64": TEXT}}}, UnsupportedInput, "not a JSON object", id="object"),
        pytest.param({"body": {"instances": TEXT}}, UnsupportedInput, "list of at least one", id="instances-string"),
        pytest.param({"body": {"instances": []}}, UnsupportedInput, "list of at least one", id="no-instances"),
        pytest.param({"body": {"instances": [[TEXT]]}}, UnsupportedInput, "not a JSON array", id="nested-instances"),
        pytest.param({"body": {"instances": [{}]}}, UnknownField, 'the one field "data"', id="empty-object"),
        pytest.param({"body": {"instances": [{"b64": TEXT}]}}, UnknownField, 'field "data"', id="instance-field"),
        pytest.param({"body": {"instances": ["a"] * 5}}, TooManyInstances, "5 instances.*at most 4", id="too-many"),
        pytest.param({"body": {}}, MissingField, NAMES_THE_ACCEPTED, id="empty-json"),
        pytest.param({"body": {"top_k": 3}}, MissingField, NAMES_THE_ACCEPTED, id="options-only"),
        pytest.param({"body": {"data": "a", "instances": ["a"]}}, MissingField, "Exactly one", id="both"),
        pytest.param({"body": {"data": "a", "topk": 3}}, UnknownField, "'topk'.*top_k", id="unknown-field"),
        pytest.param({"file": bytearray(b"a")}, UnknownField, f"'file'. {NAMES_THE_ACCEPTED}", id="unknown-form-field"),
        pytest.param({'{"data": "' + "x" * 999: ""}, UnknownField, r"^.{0,60}\.\.\.", id="json-without-header"),
        pytest.param({"instances": bytearray(b"[1")}, InvalidJSON, NAMES_THE_ACCEPTED, id="form-instances-not-json"),
    ],
)
def test_refuses(row: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        read(row, {}, MAX_INSTANCES)


@pytest.mark.parametrize("text", [b'{"data":', b"\xff\xfe\xfd", b"", b"[" * 100_000, b"1" * 100_000], ids=len)
def test_json_that_does_not_parse_is_refused(text: bytes):
    with pytest.raises(InvalidJSON, match=NAMES_THE_ACCEPTED):
        read({"body": bytearray(text)}, JSON, MAX_INSTANCES)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, [], "three", "", "2.5", "9" * 50, b"\xff", float("nan")])
def test_top_k_is_a_positive_whole_number(value: object):
    with pytest.raises(InvalidOption, match="whole number of at least 1"):
        read({"body": {"data": "a", "top_k": value}}, {}, MAX_INSTANCES)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["data", "instances", "top_k"]) | st.text(), inner),
)


@given(value=JSON_VALUES, parsed=st.booleans())
def test_any_json_is_read_or_refused(value: object, parsed: bool):
    row, headers = ({"body": value}, {}) if parsed else ({"body": body(value)}, JSON)
    try:
        request = read(row, headers, MAX_INSTANCES)
    except (MalformedRequest, InputTooLarge) as error:
        json.dumps(error.body()).encode()
    else:
        assert request.contents
        assert all(isinstance(content, str) and content for content in request.contents)


# --- base64 ------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1), st.sampled_from(["{}", "data:image/png;base64,{}", "  {}\n", "data:;base64, {}\r\n"]))
def test_base64_round_trip(content: bytes, wrapping: str):
    for encode in (base64.b64encode, base64.encodebytes):  # in one line, and in lines of 76 characters
        assert binary(wrapping.format(encode(content).decode())) == content


@given(st.binary())
def test_bytes_are_taken_as_they_are(content: bytes):
    assert binary(content) is content


@pytest.mark.parametrize(
    "text", ["not base64!", "aGVsbG8", "aGVs*G8=", "aGVsbG8=aGVsbG8=", "é", "\ud800", "data:image/png", "data:,%00"]
)
def test_text_that_is_not_base64(text: str):
    with pytest.raises(InvalidBase64, match="bytes, or base64"):
        binary(text)


@pytest.mark.parametrize("text", [" ", "data:image/png;base64,"])
def test_base64_of_nothing(text: str):
    with pytest.raises(EmptyInput):
        binary(text)


@given(st.text())
def test_any_text_is_decoded_or_refused(text: str):
    try:
        assert binary(text)
    except (InvalidBase64, EmptyInput):
        pass


# --- the tree of errors ------------------------------------------------------------------------------------------


def test_the_tree_in_the_docstring_is_the_tree():
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"[ │├└─]*(?=\w+(  |$))", line):
            name = re.findall(r"\w+", line)[0]
            path = path[: (len(match[0]) - 4) // 4] + [name]
            drawn[name] = path[-2] if len(path) > 1 else "Exception"
    classes = dict(inspect.getmembers(errors, lambda member: inspect.isclass(member)))
    assert drawn == {name: cls.__base__.__name__ for name, cls in classes.items()}


def test_only_request_errors_are_the_requests_fault():
    for error in (value for value in vars(errors).values() if inspect.isclass(value)):
        asks_again = error is errors.Overloaded
        assert error.code // 100 == (4 if issubclass(error, errors.RequestError) or asks_again else 5)
        assert error("why").body() == {"code": error.code, "type": error.__name__, "message": "why"}
