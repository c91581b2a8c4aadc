"""Reading of requests: every accepted form, and the error for every other one."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model, model_validator

from handlers.core import inputs
from handlers.core.errors import (
    EmptyInput,
    InputTooLarge,
    InvalidBase64,
    InvalidJSON,
    InvalidOption,
    MalformedRequest,
    MissingField,
    RepeatedField,
    TooManyInstances,
    UndecodableText,
    UnknownField,
    UnsupportedInput,
)
from handlers.core.inputs import Image, Text
from handlers.core.request import Repeated, Request, RequestReader, UnparsedJSON
from tests.unit.readers import (
    BASE64,
    JSON,
    MAX_INSTANCES,
    Detection,
    House,
    OneHouse,
    OneImage,
    OneText,
    Several,
    TopK,
    houses,
    images,
    request_for,
    several,
    texts,
)


def body(value: object) -> bytearray:
    """Encode JSON that TorchServe has not parsed."""
    return bytearray(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("row", "headers", "expected"),
    [
        pytest.param({"body": bytearray(b"hello")}, {}, request_for("hello"), id="raw"),
        pytest.param({"body": memoryview(b"hello")}, {}, request_for("hello"), id="raw-view"),
        pytest.param({"body": "hello"}, {"content-type": "text/plain"}, request_for("hello"), id="text"),
        pytest.param({"body": "hello"}, {"content-type": "application/json"}, request_for("hello"), id="json-string"),
        pytest.param({"body": bytearray(b'{"a":')}, {}, request_for('{"a":'), id="raw-is-not-guessed-to-be-json"),
        pytest.param({"body": {"data": "a"}}, {}, request_for("a"), id="json"),
        pytest.param({"body": {"data": "a", "top_k": 2}}, {}, request_for("a", top_k=2), id="json-top-k"),
        pytest.param({"body": body({"data": "a"})}, JSON, request_for("a"), id="json-with-charset"),
        pytest.param({"body": body("hello")}, {"content-TYPE": " Application/JSON"}, request_for("hello"), id="header"),
        pytest.param({"data": bytearray(b"hello")}, {}, request_for("hello"), id="form"),
        pytest.param({"data": "hello", "top_k": bytearray(b"3")}, {}, request_for("hello", top_k=3), id="form-top-k"),
        pytest.param({"body": {"instances": ["a", "b"]}}, {}, request_for("a", "b", many=True), id="instances"),
        pytest.param({"body": {"instances": [{"data": "a"}, "b"]}}, {}, request_for("a", "b", many=True), id="objects"),
        pytest.param(
            {"instances": body(["a"]), "top_k": "1"}, {}, request_for("a", many=True, top_k=1), id="form-instances"
        ),
        pytest.param({"instances": '["a"]'}, {}, request_for("a", many=True), id="form-instances-as-text"),
        pytest.param(
            {"data": Repeated([bytearray(b"a"), "b"]), "top_k": "1"},
            {},
            request_for("a", "b", many=True, top_k=1),
            id="form-field-several-times",
        ),
    ],
)
def test_request_is_read_in_every_accepted_form(row: dict, headers: dict, expected: Request):
    assert texts.read(row, headers) == expected


@pytest.mark.parametrize("content", [bytearray(b"\xff\0"), "/wA=", memoryview(b"\xff\0")])
@pytest.mark.parametrize("wrap", [lambda value: {"body": value}, lambda value: {"data": value}])
def test_binary_input_is_read_from_bytes_or_base64(content: object, wrap):
    assert images.read(wrap(content), {}).inputs == [OneImage(data=b"\xff\0")]


@pytest.mark.parametrize(
    "sent", [{"data": {"b64": BASE64}}, {"instances": [{"b64": BASE64}]}, {"instances": [{"data": {"b64": BASE64}}]}]
)
def test_object_b64_is_read_as_base64(sent: dict):
    assert images.read({"body": sent}, {}).inputs == [OneImage(data=b"hello")]
    assert texts.read({"body": sent}, {}).inputs == [OneText(data="hello")]
    with pytest.raises(InvalidBase64, match='In the field "image"'):
        several.read({"body": {"image": {"b64": "!"}, "caption": "a dog"}}, {})


ACCEPTED = (
    'Accepted: the input as raw body, as form field "data", or as JSON {"data": ...} or {"instances": [...]} '
    '(with Content-Type: application/json); optionally with "top_k".'
)
NAMES_THE_ACCEPTED = re.escape(ACCEPTED)


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
        pytest.param({"body": {"data": {"text": BASE64}}}, UnsupportedInput, "not a JSON object", id="object"),
        pytest.param({"body": {"data": {"b64": 5}}}, UnsupportedInput, "not a JSON object", id="b64-number"),
        pytest.param({"body": {"data": {"b64": ""}}}, EmptyInput, "no bytes", id="b64-empty"),
        pytest.param({"body": {"instances": BASE64}}, UnsupportedInput, "list of at least one", id="instances-string"),
        pytest.param({"body": {"instances": []}}, UnsupportedInput, "list of at least one", id="no-instances"),
        pytest.param({"body": {"instances": [[BASE64]]}}, UnsupportedInput, "not a JSON array", id="nested-instances"),
        pytest.param({"body": {"instances": [{}]}}, UnknownField, 'the one field "data"', id="empty-object"),
        pytest.param({"body": {"instances": [{"text": BASE64}]}}, UnknownField, 'field "data"', id="instance-field"),
        pytest.param({"body": {"instances": ["a"] * 5}}, TooManyInstances, "5 instances.*at most 4", id="too-many"),
        pytest.param({"body": {}}, MissingField, NAMES_THE_ACCEPTED, id="empty-json"),
        pytest.param({"body": {"top_k": 3}}, MissingField, NAMES_THE_ACCEPTED, id="options-only"),
        pytest.param({"body": {"data": "a", "instances": ["a"]}}, MissingField, "exactly one", id="both"),
        pytest.param({"body": {"data": "a", "topk": 3}}, UnknownField, '"topk".*top_k', id="unknown-field"),
        pytest.param({"file": bytearray(b"a")}, UnknownField, f'"file". {NAMES_THE_ACCEPTED}', id="unknown-form-field"),
        pytest.param({'{"data": "' + "x" * 999: ""}, UnknownField, r"^.{0,60}\.\.\.", id="json-without-header"),
        pytest.param({"data": Repeated(["a"] * 5)}, TooManyInstances, "5 instances.*at most 4", id="too-many-fields"),
        pytest.param({"data": Repeated(["a", ""])}, EmptyInput, NAMES_THE_ACCEPTED, id="empty-among-fields"),
        pytest.param({"data": Repeated(["a", "b"]), "instances": "[]"}, MissingField, "exactly one", id="both-twice"),
        pytest.param({"data": "a", "top_k": Repeated(["1", "2"])}, RepeatedField, '"top_k" is sent 2 t', id="options"),
        pytest.param({"instances": Repeated(["[]"] * 3)}, RepeatedField, '"instances" is sent 3 times', id="instances"),
        pytest.param({"body": Repeated([b"a", b"b"])}, UnknownField, '"body"', id="body-twice"),
        pytest.param({"instances": bytearray(b"[1")}, InvalidJSON, NAMES_THE_ACCEPTED, id="form-instances-not-json"),
    ],
)
def test_malformed_request_is_rejected_with_its_reason(row: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        texts.read(row, {})


@pytest.mark.parametrize("text", [b'{"data":', b"\xff\xfe\xfd", b"", b"[" * 100_000, b"1" * 100_000], ids=len)
def test_invalid_json_is_rejected(text: bytes):
    with pytest.raises(InvalidJSON, match=NAMES_THE_ACCEPTED):
        texts.read({"body": bytearray(text)}, JSON)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"data": {"rooms": 3, "area": NaN}}', "NaN is not a number"),
        ('{"data": {"rooms": 3, "area": -Infinity}}', "-Infinity is not a number"),
        ('{"data": {"rooms": 3, "area": 1e999}}', "a number is too large"),
        ('{"data": {"rooms": 1' + "0" * 400 + ', "area": 2}}', "a number is too large"),
        ('{"data": {"rooms": 3, "area": 2, "area": 3}}', "a name twice"),
        ('{"data": {"rooms": 3, "area": 2}, "data": {"rooms": 4, "area": 2}}', "a name twice"),
        ('{"data": {"rooms": 3, "area": 2}', "line 1 column 33"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_that_python_accepts_beyond_the_standard_is_rejected(text: str, reason: str, encoding: str):
    with pytest.raises(InvalidJSON, match=reason):
        houses.read({"body": bytearray(text.encode(encoding))}, JSON)


TWICE = UnparsedJSON(b'{"b64": "aGVsbG8=", "b64": "aGVsbG8="}')


@pytest.mark.parametrize("field", [TWICE, Repeated([b"hello", TWICE])], ids=["once", "several times"])
@pytest.mark.parametrize("reader", [texts, images], ids=["text", "image"])
def test_part_of_a_form_that_is_called_json_and_is_not_is_no_text_and_no_file(reader: RequestReader, field: object):
    with pytest.raises(InvalidJSON, match="invalid JSON: an object has a name twice"):
        reader.read({"data": field}, {})


def test_invalid_json_in_a_part_of_a_form_names_its_field():
    with pytest.raises(InvalidJSON, match='^In the field "caption": .* a name twice'):
        several.read({"image": b"hello", "caption": TWICE}, {})


@pytest.mark.parametrize("number", ["nan", "inf", "-Infinity"])
@pytest.mark.parametrize("declared", [float, list[float], dict[str, float]])
def test_numbers_in_strings_that_are_not_finite_are_rejected(declared: type, number: str):
    values = {float: number, list[float]: [number], dict[str, float]: {"a": number}}
    reader = RequestReader(create_model("Numbers", __base__=inputs.Inputs, data=declared), inputs.Options, 1)
    with pytest.raises(UnsupportedInput, match="finite number"):
        reader.read({"body": {"data": values[declared]}}, {})


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, [], "three", "", "2.5", b"\xff", float("nan")])
def test_invalid_top_k_is_rejected(value: object):
    with pytest.raises(InvalidOption, match="whole number of at least 1"):
        texts.read({"body": {"data": "a", "top_k": value}}, {})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "instances", "top_k"]) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=JSON_VALUES, parsed=st.booleans())
def test_any_json_is_read_or_rejected(value: object, parsed: bool):
    row, headers = ({"body": value}, {}) if parsed else ({"body": body(value)}, JSON)
    try:
        request = texts.read(row, headers)
    except (MalformedRequest, InputTooLarge, UndecodableText) as error:
        json.dumps(error.body()).encode()
    else:
        assert request.inputs
        assert all(isinstance(each.data, str) and each.data for each in request.inputs)


# --- inputs that are JSON, and several inputs ---------------------------------------------------------------------

HOUSE = {"rooms": 3, "area": 70.5}


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": {"data": HOUSE}}, {}),
        ({"body": body({"data": HOUSE})}, JSON),
        ({"data": body(HOUSE)}, {}),
        ({"data": json.dumps(HOUSE)}, {}),
        ({"body": body(HOUSE)}, {}),  # a file that is sent without a Content-Type
    ],
)
def test_json_input_is_read_as_the_declared_type(row: dict, headers: dict):
    assert houses.read(row, headers) == Request([OneHouse(data=House(**HOUSE))], inputs.Options())


def test_json_input_sent_several_times_is_several_inputs():
    request = houses.read({"data": Repeated([json.dumps(HOUSE), body(HOUSE)])}, {})
    assert request == Request([OneHouse(data=House(**HOUSE))] * 2, inputs.Options(), many=True)


@pytest.mark.parametrize("name", ["image", "caption", "crowd"])
def test_field_sent_twice_to_a_model_of_several_inputs_is_rejected(name: str):
    row = {"image": b"hello", "caption": "a dog", "crowd": "true"}
    with pytest.raises(RepeatedField, match=f'"{name}" is sent 2 times'):
        several.read({**row, name: Repeated([row[name]] * 2)}, {})


def test_instances_of_a_json_input_may_be_wrapped():
    request = houses.read({"body": {"instances": [HOUSE, {"data": HOUSE}]}}, {})
    assert request == Request([OneHouse(data=House(**HOUSE))] * 2, inputs.Options(), many=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rooms": "many", "area": 1}, '"data.rooms" is invalid: Input should be a valid integer'),
        ({"rooms": 1}, '"data.area" is invalid: Field required'),
        ([1, 2], '"data" is invalid'),
        (None, '"data" is invalid'),
    ],
)
def test_json_input_of_another_type_is_rejected_by_name(value: object, message: str):
    with pytest.raises(UnsupportedInput, match=message):
        houses.read({"body": {"data": value}}, {})


def test_json_body_without_the_field_is_rejected_without_the_advice_to_send_a_raw_body():
    with pytest.raises(UnknownField, match=r'"rooms".*Accepted: the input as form field "data", or as JSON'):
        houses.read({"body": body(HOUSE)}, JSON)


def test_several_inputs_are_read_by_name():
    expected = Several(image=b"hello", caption="a dog")
    assert several.read({"image": bytearray(b"hello"), "caption": "a dog"}, {}).inputs == [expected]
    assert several.read({"body": {"image": BASE64, "caption": "a dog"}}, {}).inputs == [expected]
    with_audio = several.read({"body": {"instances": [{"image": BASE64, "caption": "a dog", "audio": BASE64}]}}, {})
    assert with_audio.inputs == [Several(image=b"hello", caption="a dog", audio=b"hello")]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"body": bytearray(b"x")}, UnsupportedInput, 'several inputs.*"image": ..., "caption": ..., "audio": ...'),
        ({"image": b"x"}, MissingField, 'The field "caption" is missing. Accepted: form fields "image"'),
        ({"image": b"x", "caption": ""}, EmptyInput, "is empty"),
        ({"body": {"instances": [{"image": BASE64}]}}, MissingField, '"caption" is missing'),
        ({"body": {"instances": ["a"]}}, UnsupportedInput, "object with the fields image, caption, audio"),
        ({"body": {"image": "x", "instances": []}}, MissingField, "not both"),
    ],
)
def test_incomplete_inputs_are_rejected(row: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        several.read(row, {})


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"score_threshold": 0.25}, {"score_threshold": 0.25}),
        ({"score_threshold": 1, "crowd": True}, {"score_threshold": 1.0, "crowd": True}),
        ({"score_threshold": "0.25", "method": b"exact"}, {"score_threshold": 0.25, "method": "exact"}),
        ({"crowd": "true"}, {"crowd": True}),
        ({"max_detections": bytearray(b"100")}, {"max_detections": 100}),
    ],
)
def test_options_are_read_from_json_and_from_form_text(given: dict, expected: dict):
    request = several.read({"image": b"x", "caption": "y", **given}, {})
    assert request.options == Detection(**expected)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("score_threshold", 1.5, "score_threshold must be a number from 0 to 1."),
        ("score_threshold", "nan", "score_threshold must be a number from 0 to 1."),
        ("max_detections", 0, "max_detections must be a whole number from 1 to 100."),
        ("max_detections", 2.0, "max_detections must be a whole number from 1 to 100."),
        ("method", "slow", "method must be one of fast, exact."),
        ("crowd", 1, "crowd must be true or false."),
        ("crowd", None, "crowd must be true or false."),
    ],
)
def test_invalid_option_is_rejected_with_its_valid_values(option: str, value: object, message: str):
    with pytest.raises(InvalidOption, match=f"^{re.escape(message)}$"):
        several.read({"image": b"x", "caption": "y", option: value}, {})


class Interval(inputs.Options):
    low: float = 0
    high: float = 1

    @model_validator(mode="after")
    def check_order(self) -> "Interval":
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


def test_options_rejected_by_a_validator_are_an_invalid_option():
    reader = RequestReader(OneText, Interval, MAX_INSTANCES)
    assert reader.read({"data": "a", "low": "0.5"}, {}).options == Interval(low=0.5)
    with pytest.raises(InvalidOption, match="low must not be above high"):
        reader.read({"data": "a", "low": "2"}, {})


def test_inputs_rejected_by_a_validator_are_unsupported():
    class Pair(inputs.Inputs):
        first: int
        second: int

        @model_validator(mode="after")
        def check_order(self) -> "Pair":
            if self.first > self.second:
                raise ValueError("first must not be above second")
            return self

    reader = RequestReader(Pair, inputs.Options, MAX_INSTANCES)
    assert reader.read({"body": {"first": 1, "second": 2}}, {}).inputs == [Pair(first=1, second=2)]
    with pytest.raises(UnsupportedInput, match="^The inputs are invalid: .*first must not be above second"):
        reader.read({"body": {"first": 2, "second": 1}}, {})


def test_null_for_an_optional_input_is_accepted():
    request = several.read({"body": {"image": BASE64, "caption": "a dog", "audio": None}}, {})
    assert request.inputs == [Several(image=b"hello", caption="a dog")]
    with pytest.raises(UnsupportedInput, match="JSON null"):
        several.read({"body": {"image": BASE64, "caption": None}}, {})


class NoInputs(inputs.Inputs):
    pass


class NoDefault(inputs.Options):
    top_k: int


class SameName(inputs.Options):
    data: int = 1


class ReservedName(inputs.Inputs):
    instances: Text


class ReservedOption(inputs.Options):
    instances: int = 1


class SeveralImages(inputs.Inputs):
    data: list[Image]


class NamedTexts(inputs.Inputs):
    data: dict[str, Text | None]


@pytest.mark.parametrize(
    ("declared_inputs", "declared_options", "named"),
    [
        (NoInputs, TopK, "NoInputs declares no field"),
        (OneText, NoDefault, "NoDefault.top_k has no default"),
        (OneText, SameName, "OneText or SameName: the name data is taken"),
        (ReservedName, TopK, "ReservedName or ClassifierHandler.Options: the name instances is taken"),
        (OneText, ReservedOption, "OneText or ReservedOption: the name instances is taken"),
        (SeveralImages, TopK, "the kind image inside"),
        (NamedTexts, TopK, "the kind text inside"),
    ],
)
def test_reader_of_an_invalid_declaration_raises(declared_inputs: type, declared_options: type, named: str):
    with pytest.raises(TypeError, match=named):
        RequestReader(declared_inputs, declared_options, MAX_INSTANCES)


def test_picture_is_refused_for_instances_and_accepted_for_one_input():
    reader = RequestReader(OneText, inputs.PictureOptions, MAX_INSTANCES)
    assert reader.read({"data": "a", "format": "png"}, {}).options.format == "png"
    assert reader.read({"body": {"instances": ["a"], "format": "json"}}, JSON).many
    for row in ({"body": {"instances": ["a"], "format": "png"}}, {"data": Repeated(["a", "b"]), "format": "png"}):
        with pytest.raises(InvalidOption, match="Send one input to get png"):
            reader.read(row, JSON)
    with pytest.raises(InvalidOption, match="format must be one of json, png"):
        reader.read({"data": "a", "format": "gif"}, {})
