"""The Open Inference Protocol over gRPC on a real server, with Triton's own client."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import requests
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as messages
from tritonclient.utils import InferenceServerException

from bundle.catalog import ModelFolder, select
from bundle.samples import first
from bundle.server.grpc_client import predict
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import batches

MODELS = {model.name: model for model in select(SHIPPED)}
TENSORS = {"mnist": "pixels", "image": "pixels", "audio": "waveform", "text": "ids"}
TYPES = {"UINT8": numpy.uint8, "FP32": numpy.float32, "INT64": numpy.int64}


def address(served: Place) -> str:
    return f"127.0.0.1:{served.ports['grpc_inference_port']}"


@pytest.fixture(scope="module")
def client(served: Place) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(served)) as connected:
        yield connected


def files(*contents: bytes) -> triton.InferInput:
    data = numpy.array(contents, numpy.object_)
    return triton.InferInput("data", [len(contents)], "BYTES").set_data_from_numpy(data)


def samples(model: ModelFolder, count: int = 1) -> triton.InferInput:
    assert model.sample_file is not None
    return files(*[model.sample_file.read_bytes()] * count)


def native(served: Place, name: str) -> dict:
    content = MODELS[name].sample_file.read_bytes()
    return requests.post(f"{served.client.inference}/predictions/{name}", content, timeout=60).json()


def answers(result: triton.InferResult) -> list[dict]:
    return [json.loads(each) for each in result.as_numpy("json")]


def labels(found: list[dict]) -> list[str]:
    return [first(each).label for each in found]


def failure(client: triton.InferenceServerClient, name: str, given: triton.InferInput, **options) -> tuple[str, str]:
    """Return status and message of a request that is rejected."""
    with pytest.raises(InferenceServerException) as raised:
        client.infer(name, [given], **options)
    return raised.value.status().removeprefix("StatusCode."), raised.value.message()


# --- predictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_client_gets_the_native_answers(served: Place, client: triton.InferenceServerClient, name: str):
    expected = native(served, name)
    result = client.infer(name, [samples(MODELS[name], 3)], request_id="7")
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == (name, "1.0", "7")
    assert labels(answers(result)) == labels([expected]) * 3
    again = client.infer(name, [samples(MODELS[name])], model_version="1.0")
    assert labels(answers(again)) == labels([expected])


@pytest.mark.parametrize("name", SHIPPED)
def test_metadata_describe_what_the_model_takes_and_returns(client: triton.InferenceServerClient, name: str):
    metadata = client.get_model_metadata(name, "1.0")
    assert (metadata.name, metadata.versions, metadata.platform) == (name, ["1.0"], "pytorch_torchscript")
    inputs = {each.name: each for each in metadata.inputs}
    assert list(inputs) == ["data", TENSORS[name]]
    tensor = inputs[TENSORS[name]]
    shape = [2, *(6 if size < 0 else size for size in tensor.shape[1:])]
    values = numpy.ones(shape, TYPES[tensor.datatype])
    result = client.infer(name, [triton.InferInput(tensor.name, shape, tensor.datatype).set_data_from_numpy(values)])
    assert [each.name for each in result.get_response().outputs] == [each.name for each in metadata.outputs]
    for output in metadata.outputs:
        found = result.as_numpy(output.name)
        assert found.shape[0] == 2
        assert len(found.shape) == len(output.shape)
        assert result.get_output(output.name).datatype == output.datatype


def test_parameters_are_options_and_outputs_are_chosen(client: triton.InferenceServerClient):
    asked = [triton.InferRequestedOutput("probability"), triton.InferRequestedOutput("label")]
    given = files(b"what is the weather like tomorrow", b"transfer money to my savings account")
    result = client.infer("text", [given], outputs=asked, parameters={"top_k": 2}, priority=1, timeout=10**6)
    assert [each.name for each in result.get_response().outputs] == ["probability", "label"]
    assert result.as_numpy("probability").shape == result.as_numpy("label").shape == (2, 2)
    assert len({bytes(row[0]) for row in result.as_numpy("label")}) == 2


def test_elements_in_typed_fields_are_read_like_raw_ones(client: triton.InferenceServerClient):
    request = messages.ModelInferRequest(model_name="text")
    tensor = request.inputs.add(name="data", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"what is the weather", b"transfer money"])
    typed = triton.InferResult(client._client_stub.ModelInfer(request, timeout=30))
    raw = client.infer("text", [files(b"what is the weather", b"transfer money")])
    assert labels(answers(typed)) == labels(answers(raw))
    numbers = messages.ModelInferRequest(model_name="text")
    numbers.inputs.add(name="ids", datatype="INT64", shape=[1, 3]).contents.int64_contents.extend([1, 2, 3])
    ids = triton.InferInput("ids", [1, 3], "INT64").set_data_from_numpy(numpy.array([[1, 2, 3]], numpy.int64))
    same = triton.InferResult(client._client_stub.ModelInfer(numbers, timeout=30))
    assert labels(answers(same)) == labels(answers(client.infer("text", [ids])))


def test_clients_of_both_transports_and_all_protocols_share_batches(
    served: Place, client: triton.InferenceServerClient
):
    expected = labels([native(served, "mnist")])
    digit = MODELS["mnist"].sample_file.read_bytes()
    body = json.dumps({"inputs": [{"name": "data", "shape": [1], "datatype": "BYTES", "data": ["no base64"]}]})
    http, metrics = served.client.inference, served.url("metrics_address")
    start = threading.Barrier(16)

    def ask(index: int) -> list[str] | str:
        if index < 16:
            start.wait(60)
        match index % 5:
            case 0:
                return labels(answers(client.infer("mnist", [files(digit)])))
            case 1:
                return failure(client, "mnist", files(b"no image"))[0]
            case 2:
                return labels([json.loads(predict(address(served), "mnist", digit))])
            case 3:
                return str(requests.post(f"{http}/v2/models/mnist/infer", body, timeout=60).status_code)
        return labels([requests.post(f"{http}/predictions/mnist", digit, timeout=60).json()])

    predict(address(served), "mnist", digit)  # its first call compiles the protocol
    before = batches(metrics, "mnist")
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(ask, range(160)))
    after = batches(metrics, "mnist", before[1] + len(found))
    count, requests_sent = (later - earlier for later, earlier in zip(after, before, strict=True))
    assert found == [expected, "INVALID_ARGUMENT", expected, "400", expected] * 32
    assert requests_sent == 160
    assert count < 160


def test_compressed_request_is_read(client: triton.InferenceServerClient):
    result = client.infer("text", [files(b"what is the weather")], compression_algorithm="gzip")
    assert labels(answers(result)) == labels(answers(client.infer("text", [files(b"what is the weather")])))


# --- errors -------------------------------------------------------------------------------------------------------


def test_errors_say_to_the_client_what_was_wrong(client: triton.InferenceServerClient):
    digit, one = samples(MODELS["mnist"]), files(b"x")
    numbers = triton.InferInput("pixels", [1, 2], "UINT8").set_data_from_numpy(numpy.ones([1, 2], numpy.uint8))
    empty = triton.InferInput("data", [0], "BYTES").set_data_from_numpy(numpy.array([], numpy.object_))
    cases = [
        ("NOT_FOUND", "nothing", digit, {}, "nothing"),
        ("NOT_FOUND", "mnist", digit, {"model_version": "9.9"}, "9.9"),
        ("INVALID_ARGUMENT", "mnist", digit, {"parameters": {"topk": 1}}, '"topk"'),
        ("INVALID_ARGUMENT", "text", one, {"parameters": {"top_k": 0.5}}, "top_k"),
        ("INVALID_ARGUMENT", "mnist", files(b"no image"), {}, "image"),
        ("INVALID_ARGUMENT", "mnist", numbers, {}, "must be UINT8 [N, 1, 28, 28]"),
        ("INVALID_ARGUMENT", "mnist", empty, {}, "no elements"),
        ("INVALID_ARGUMENT", "mnist", samples(MODELS["mnist"], 33), {}, "at most 32"),
        ("INVALID_ARGUMENT", "mnist", digit, {"outputs": [triton.InferRequestedOutput("score")]}, '"score"'),
    ]
    for status, name, given, options, words in cases:
        found, message = failure(client, name, given, **options)
        assert (found, words in message) == (status, True), (name, options, found, message)


def test_client_that_does_not_wait_long_enough_harms_nobody(client: triton.InferenceServerClient):
    found, _ = failure(client, "image", samples(MODELS["image"], 8), client_timeout=0.001)
    assert found == "DEADLINE_EXCEEDED"
    assert len(answers(client.infer("image", [samples(MODELS["image"])]))) == 1


def test_server_and_its_models_are_ready(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", "1.0")
    with pytest.raises(InferenceServerException, match=r"9\.9"):
        client.is_model_ready("mnist", "9.9")
