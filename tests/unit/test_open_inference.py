"""The Open Inference Protocol in TorchServe's own worker code, in batches with other requests (fixture `worker`)."""

import base64
import json
import math
import struct
from typing import Any
from unittest.mock import patch

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.build.dryrun import DryRun
from handlers.core.classifier import ClassifierHandler
from handlers.core.errors import UndecodableInput
from handlers.core.headers import Verb
from handlers.core.open_inference import JSON_SIZE, PROTOCOL, OpenInferenceReader
from handlers.core.tensor_answers import Respond
from handlers.core.tensor_data import from_binary
from tests.unit.numbered import BATCH_SIZE, CLASSES, MAX_INSTANCES, approximately, row

V2 = {PROTOCOL: "v2"}
TEXTS = ["1,0,1,-1", "2,2,1,-2", "3,0,1,-3"]


def body_of(*texts: str, **more: Any) -> dict:
    return {"inputs": [{"name": "data", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}], **more}


def send(worker: DryRun, document: object, binary: bytes = b"", **headers: str) -> tuple[int, Any]:
    """Send a request as the frontend passes it on: bytes. Return the status, and the JSON or the bytes."""
    encoded = json.dumps(document).encode()
    if binary:
        headers = {JSON_SIZE: str(len(encoded)), **headers}
    [answer] = worker.predict([{"body": encoded + binary}], [V2 | headers])
    return answer


def outputs_of(answer: object) -> dict[str, dict]:
    assert isinstance(answer, dict), answer
    return {each["name"]: each for each in answer["outputs"]}


def native(worker: DryRun, *texts: str) -> list[dict]:
    [(status, answer)] = worker.predict([{"instances": list(texts)}])
    assert status == 200
    return answer["predictions"]  # type: ignore[index]


# --- answers ------------------------------------------------------------------------------------------------------


def test_texts_are_answered_like_native_instances(worker: DryRun):
    status, answer = send(worker, body_of(*TEXTS, id="mine"))
    assert status == 200
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("numbers", "1.0", "mine")
    found = outputs_of(answer)
    assert list(found) == ["label", "class", "probability", "json"]
    expected = native(worker, *TEXTS)
    assert [json.loads(each) for each in found["json"]["data"]] == expected
    assert found["class"] == {
        "name": "class",
        "shape": [3, 3],
        "datatype": "INT64",
        "data": [entry["class"] for each in expected for entry in each["top_k"]],
    }
    assert found["label"]["data"] == [entry["label"] for each in expected for entry in each["top_k"]]
    assert found["probability"]["data"] == [entry["probability"] for each in expected for entry in each["top_k"]]


def test_parameters_are_options(worker: DryRun):
    _, answer = send(worker, body_of(TEXTS[0], parameters={"top_k": 1, "priority": 0}))
    assert outputs_of(answer)["class"]["shape"] == [1, 1]
    _, answer = send(worker, body_of(TEXTS[0]), **{"bundle-query": "top_k=2"})
    assert outputs_of(answer)["class"]["shape"] == [1, 2]


def test_outputs_come_as_asked_in_json_or_binary(worker: DryRun):
    asked = [{"name": "probability", "parameters": {"binary_data": True}}, {"name": "label"}]
    status, content = send(worker, body_of(*TEXTS, outputs=asked))
    assert status == 200
    document, size = json.JSONDecoder().raw_decode(content.decode("latin-1"))
    found = outputs_of(document)
    assert list(found) == ["probability", "label"]
    assert found["probability"]["parameters"] == {"binary_data_size": 3 * 3 * 4}
    assert "data" not in found["probability"]
    probabilities = numpy.frombuffer(content[size:], "<f4").reshape(found["probability"]["shape"])
    expected = [[entry["probability"] for entry in each["top_k"]] for each in native(worker, *TEXTS)]
    assert probabilities.tolist() == expected  # float32 on both ways


def test_all_outputs_are_binary_as_tritons_client_asks_by_default(worker: DryRun):
    _, content = send(worker, body_of(*TEXTS, parameters={"binary_data_output": True}))
    document, at = json.JSONDecoder().raw_decode(content.decode("latin-1"))
    values = {}
    for each in document["outputs"]:
        size = each["parameters"]["binary_data_size"]
        values[each["name"]] = from_binary("x", each["datatype"], each["shape"], memoryview(content[at : at + size]))
        at += size
    assert at == len(content)
    assert [json.loads(each) for each in values["json"]] == native(worker, *TEXTS)


def test_size_of_the_json_is_a_header_of_a_binary_answer(worker: DryRun):
    context = worker.service.context
    send(worker, body_of(TEXTS[0], parameters={"binary_data_output": True}))
    size = int(worker.handler.context.get_response_headers(0)[JSON_SIZE])
    assert context is worker.handler.context
    assert size > 100
    send(worker, body_of(TEXTS[0]))
    assert JSON_SIZE not in worker.handler.context.get_response_headers(0)


# --- inputs -------------------------------------------------------------------------------------------------------


def binary_input(*values: bytes, **more: Any) -> tuple[dict, bytes]:
    content = b"".join(struct.pack("<I", len(each)) + each for each in values)
    described = {"name": "data", "shape": [len(values), 1], "datatype": "BYTES"}
    return {"inputs": [{**described, "parameters": {"binary_data_size": len(content)}}], **more}, content


def test_binary_elements_are_read_like_json(worker: DryRun):
    document, content = binary_input(*(text.encode() for text in TEXTS))
    assert send(worker, document, content) == send(worker, body_of(*TEXTS))


def test_base64_is_decoded_where_its_content_type_says_so(worker: DryRun):
    document = body_of(*(base64.b64encode(text.encode()).decode() for text in TEXTS))
    document["inputs"][0]["parameters"] = {"content_type": "base64"}
    assert send(worker, document) == send(worker, body_of(*TEXTS))


def test_body_without_json_is_the_only_input(worker: DryRun):
    [(status, content)] = worker.predict([{"body": TEXTS[0].encode()}], [V2 | {JSON_SIZE: "0"}])
    assert status == 200
    _, expected = send(worker, body_of(TEXTS[0], parameters={"binary_data_output": True}))
    assert content == expected


def test_header_of_any_case_says_where_the_json_ends(worker: DryRun):
    document, content = binary_input(TEXTS[0].encode())
    encoded = json.dumps(document).encode()
    headers = V2 | {JSON_SIZE.lower(): str(len(encoded))}
    [(status, _)] = worker.predict([{"body": encoded + content}], [headers])
    assert status == 200


def numbers(values: list, shape: list[int], datatype: str = "FP32") -> dict:
    return {"inputs": [{"name": "numbers", "shape": shape, "datatype": datatype, "data": values}]}


def test_tensors_of_the_module_skip_decoding(worker: DryRun):
    rows = [[float(number) for number in text.split(",")] for text in TEXTS]
    expected = send(worker, body_of(*TEXTS))
    assert send(worker, numbers(rows, [3, 4])) == expected
    binary = numpy.array(rows, "<f4").tobytes()
    described = {"name": "numbers", "shape": [3, 4], "datatype": "FP32", "parameters": {"binary_data_size": 48}}
    assert send(worker, {"inputs": [described]}, binary) == expected


def test_null_is_like_a_missing_part(worker: DryRun):
    document = body_of(*TEXTS, id=None, parameters=None, outputs=None)
    document["inputs"][0]["parameters"] = None
    assert send(worker, document) == send(worker, body_of(*TEXTS))


def test_parsed_body_is_read_like_its_bytes(worker: DryRun):
    """TorchServe's own reader parses a body of application/json."""
    for body in (body_of(*TEXTS), json.dumps(body_of(*TEXTS))):
        [answer] = worker.predict([{"body": body}], [V2])
        assert answer == send(worker, body_of(*TEXTS))


# --- errors -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[object, int, str]] = {
    "undecodable": (body_of("1,2"), 400, "Four numbers"),
    "no object": ([1], 400, '"inputs"'),
    "no inputs": ({"inputs": []}, 400, "inputs"),
    "unknown input": ({"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}, 400, '"data"'),
    "no data": ({"inputs": [{"name": "data", "shape": [1], "datatype": "BYTES"}]}, 400, '"data"'),
    "datatype": ({"inputs": [{"name": "data", "shape": [1], "datatype": "BF16", "data": [1]}]}, 400, "BF16"),
    "number for a file": ({"inputs": [{"name": "data", "shape": [1], "datatype": "FP32", "data": [1]}]}, 400, "BYTES"),
    "shape": ({"inputs": [{"name": "data", "shape": [2], "datatype": "BYTES", "data": ["a"]}]}, 400, "2 elements"),
    "negative shape": ({"inputs": [{"name": "data", "shape": [-1], "datatype": "BYTES", "data": ["a"]}]}, 400, "shape"),
    "huge shape": ({"inputs": [{"name": "data", "shape": [10**300], "datatype": "BYTES", "data": []}]}, 400, "shape"),
    "no samples": (body_of(), 400, "at least one sample"),
    "too many": (body_of(*["1,2,3,4"] * (MAX_INSTANCES + 1)), 413, "at most"),
    "option": (body_of("1,2,3,4", parameters={"top_k": 0}), 400, "top_k"),
    "option of the model": (body_of("1,2,3,4", parameters={"top_k": CLASSES + 1}), 400, "top_k"),
    "parameter": (body_of("1,2,3,4", parameters={"topk": 1}), 400, '"top_k"'),
    "output": (body_of("1,2,3,4", outputs=[{"name": "logits"}]), 400, '"probability"'),
    "output twice": (body_of("1,2,3,4", outputs=[{"name": "json"}] * 2), 400, "twice"),
    "binary": (body_of("1,2,3,4", parameters={"binary_data_output": 1}), 400, "true or false"),
    "classification": (
        body_of("1,2,3,4", outputs=[{"name": "json", "parameters": {"classification": 2}}]),
        400,
        "classification",
    ),
    "shape of the tensor": (numbers([1.0, 2.0], [1, 2]), 400, r"FP32 [N, 4]"),
    "datatype of the tensor": (numbers([1, 2, 3, 4], [1, 4], "INT64"), 400, "INT64"),
    "tensor and text": ({"inputs": body_of("1,2,3,4")["inputs"] + numbers([1.0] * 4, [1, 4])["inputs"]}, 400, '"data"'),
    "id": (body_of("1,2,3,4", id=7), 400, "id"),
    "long id": (body_of("1,2,3,4", id="x" * 257), 400, "256"),
    "more samples than are sent": (
        {"inputs": [{"name": "data", "shape": [10**6], "datatype": "BYTES", "data": ["a"]}]},
        413,
        "at most",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_request_is_an_error_of_the_protocol(worker: DryRun, kind: str):
    document, status, words = BAD[kind]
    refused, answer = send(worker, document)
    assert (refused, list(answer)) == (status, ["error"])
    assert words in answer["error"]
    assert answer["error"].endswith(".")


@pytest.mark.parametrize("size", ["-1", "1e3", "100000", "9" * 5000, "\u0661", "", "5"])
def test_size_of_the_json_that_is_wrong_is_an_error(worker: DryRun, size: str):
    document, content = binary_input(TEXTS[0].encode())
    status, answer = send(worker, document, content, **{JSON_SIZE: size})
    assert (status, list(answer)) == (400, ["error"])


def test_bytes_that_no_tensor_has_are_an_error(worker: DryRun):
    document, content = binary_input(TEXTS[0].encode())
    status, answer = send(worker, document, content + b"more")
    assert (status, "4 bytes more" in answer["error"]) == (400, True)
    document["inputs"][0]["parameters"]["binary_data_size"] = len(content) + 1
    status, answer = send(worker, document, content)
    assert (status, "binary_data_size" in answer["error"]) == (400, True)


def test_elements_beyond_the_first_dimension_are_an_error(worker: DryRun):
    document = body_of(*TEXTS)
    document["inputs"][0]["shape"] = [1, 3]
    status, answer = send(worker, document)
    assert (status, "[N] or [N, 1]" in answer["error"]) == (400, True)


def test_handler_may_reject_the_values_of_tensors(worker: DryRun):
    with patch.object(worker.handler, "check_tensors", side_effect=UndecodableInput("Five is odd.")):
        status, answer = send(worker, numbers([5.0] * 4, [1, 4]))
    assert (status, answer) == (400, {"error": "Five is odd."})


def test_number_that_is_not_finite_leaves_in_no_form():
    for binary in (True, False):
        respond = Respond("numbers", "1.0", None, (("probability", binary),), ClassifierHandler.columns)
        with pytest.raises(ValueError, match="JSON compliant"):
            respond([{"top_k": [{"probability": math.nan}]}])


documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["data", "numbers", "BYTES", "FP32", "json", "1,2,3,4", "base64"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data_size"]
                + ["binary_data", "binary_data_output", "content_type", "top_k"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@st.composite
def damaged(draw: st.DrawFn) -> dict:
    """Return a valid request in which one value is another."""
    document: Any = draw(
        st.sampled_from(
            [body_of(*TEXTS, outputs=[{"name": "json"}]), numbers([1.0] * 4, [1, 4]), binary_input(b"1")[0]]
        )
    )
    document = at = json.loads(json.dumps(document))
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            at[key] = draw(documents)
            return document
        at = at[key]


@given(documents | damaged(), st.binary(max_size=12))
def test_damaged_body_is_never_a_fault_of_the_server(worker: DryRun, document: object, binary: bytes):
    status, answer = send(worker, document, binary)
    assert status in (200, 400, 413), answer
    assert status == 200 or list(answer) == ["error"]


@given(st.binary(max_size=60), st.integers(0, 70).map(str))
def test_bytes_that_are_no_request_are_an_error(worker: DryRun, content: bytes, size: str):
    [(status, answer)] = worker.predict([{"body": content}], [V2 | {JSON_SIZE: size}])
    assert (status, list(answer)) == (400, ["error"])  # type: ignore[call-overload]


@pytest.mark.parametrize("row", [{}, {"data": b"1,2,3,4"}, {"body": b"a", "data": b"b"}])
def test_form_is_an_error_of_the_protocol(worker: DryRun, row: dict):
    [(status, answer)] = worker.predict([row], [V2])
    assert (status, list(answer)) == (400, ["error"])  # type: ignore[call-overload]


def test_fault_of_the_handler_is_an_error_of_the_protocol(worker: DryRun):
    status, answer = send(worker, body_of("bug"))
    assert (status, list(answer)) == (500, ["error"])
    assert "ZeroDivisionError" not in answer["error"]


# --- batches ------------------------------------------------------------------------------------------------------

kinds = ["v2", "v2 tensors", "v2 bad", "native", "native many", "native bad"]


def request_of(kind: str, index: int) -> tuple[dict, dict[str, str]]:
    text = row(index)["body"].decode()
    values = [float(number) for number in text.split(",")]
    requests: dict[str, tuple[dict, dict[str, str]]] = {
        "v2": ({"body": json.dumps(body_of(text, *TEXTS)).encode()}, V2),
        "v2 tensors": ({"body": json.dumps(numbers(values, [1, 4])).encode()}, V2),
        "v2 bad": ({"body": json.dumps(body_of("1,2")).encode()}, V2),
        "native": ({"body": text.encode()}, {}),
        "native many": ({"instances": [text, TEXTS[0]]}, {}),
        "native bad": ({"body": b"1,2"}, {}),
    }
    return requests[kind]


def rankings(answer: Any) -> list:
    """Return the rankings of an answer, to be compared; or the error."""
    if "outputs" in answer:
        return [approximately(json.loads(each)) for each in outputs_of(answer)["json"]["data"]]
    return (
        [approximately(each) for each in answer.get("predictions", [answer])] if "message" not in answer else [answer]
    )


def plain(answer: Any) -> list:
    if "outputs" in answer:
        return [json.loads(each) for each in outputs_of(answer)["json"]["data"]]
    return answer.get("predictions", [answer])


@given(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 20)), min_size=1, max_size=BATCH_SIZE))
def test_requests_of_all_protocols_share_batches_and_affect_no_other(worker: DryRun, mixed: list[tuple[str, int]]):
    pairs = [request_of(*each) for each in mixed]
    answers = worker.predict([row for row, _ in pairs], [headers for _, headers in pairs])
    for (status, answer), (kind, _), (one, headers) in zip(answers, mixed, pairs, strict=True):
        [(alone, expected)] = worker.predict([one], [headers])
        assert status == alone == (400 if kind.endswith("bad") else 200)
        if status == 200:
            assert plain(answer) == rankings(expected)
        else:
            assert answer == expected
            assert ("error" in answer) == kind.startswith("v2")  # type: ignore[operator]


def test_explanations_take_no_tensors_and_have_no_columns(worker: DryRun):
    reader = worker.handler.readers[Verb.EXPLAIN, True]
    assert isinstance(reader, OpenInferenceReader)
    assert (reader.columns, reader.tensors) == ((), {})
    status, answer = send(worker, body_of(TEXTS[0]), explain="True")
    assert (status, answer) == (400, {"error": "This model does not support explanations. Use /predictions."})
    assert ClassifierHandler.columns
