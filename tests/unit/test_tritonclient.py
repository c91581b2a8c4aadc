"""Triton's own client writes requests to the handler, and reads its answers (fixture `worker`)."""

import json

import numpy
import pytest
import tritonclient.http as triton

from bundle.build.dryrun import DryRun
from handlers.core.open_inference import JSON_SIZE, PROTOCOL
from tests.unit.numbered import approximately

TEXTS = ["1,0,1,-1", "2,2,1,-2", "3,0,1,-3"]
NUMBERS = numpy.array([[float(number) for number in text.split(",")] for text in TEXTS], numpy.float32)
COLUMNS = ["label", "class", "probability", "json"]


def infer(worker: DryRun, inputs: list[triton.InferInput], **options: object) -> triton.InferResult:
    body, json_size = triton.InferenceServerClient.generate_request_body(inputs, **options)
    headers = {PROTOCOL: "v2"} | ({JSON_SIZE: str(json_size)} if json_size is not None else {})
    [(status, answer)] = worker.predict([{"body": body}], [headers])
    assert status == 200, answer
    size = worker.handler.context.get_response_headers(0).get(JSON_SIZE)
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return triton.InferenceServerClient.parse_response_body(content, header_length=int(size) if size else None)


def texts(binary: bool) -> triton.InferInput:
    data = triton.InferInput("data", [len(TEXTS), 1], "BYTES")
    return data.set_data_from_numpy(numpy.array(TEXTS, numpy.object_).reshape(-1, 1), binary_data=binary)


def numbers(binary: bool) -> triton.InferInput:
    return triton.InferInput("numbers", [3, 4], "FP32").set_data_from_numpy(NUMBERS, binary_data=binary)


@pytest.mark.parametrize("given", [texts, numbers])
@pytest.mark.parametrize("sends_binary", [True, False])
@pytest.mark.parametrize("outputs", ["default", "binary", "json"])
def test_client_gets_the_answers_of_all_samples(worker: DryRun, given, sends_binary: bool, outputs: str):
    [(_, expected)] = worker.predict([{"instances": TEXTS}])
    asked = [triton.InferRequestedOutput(name, binary_data=outputs == "binary") for name in COLUMNS]
    options = {} if outputs == "default" else {"outputs": asked}
    result = infer(worker, [given(sends_binary)], request_id="7", parameters={"top_k": 2}, **options)
    rankings = [each["top_k"][:2] for each in expected["predictions"]]  # type: ignore[index]
    assert result.get_response()["id"] == "7"
    assert result.as_numpy("class").tolist() == [[entry["class"] for entry in each] for each in rankings]
    labels = [[each if isinstance(each, str) else each.decode() for each in row] for row in result.as_numpy("label")]
    assert labels == [[entry["label"] for entry in each] for each in rankings]
    probabilities = [[entry["probability"] for entry in each] for each in rankings]
    assert result.as_numpy("probability") == pytest.approx(numpy.array(probabilities), abs=1e-5)
    for each, ranking in zip(result.as_numpy("json"), rankings, strict=True):
        assert json.loads(each) == approximately({"top_k": ranking})
