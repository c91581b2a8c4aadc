"""The routes of KServe and SageMaker on a real server, with Triton's own client and with raw requests."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from bundle.catalog import ModelFolder, select
from bundle.samples import first
from tests.server.place import Place
from tests.shipped import SHIPPED

MODELS = {model.name: model for model in select(SHIPPED)}
TENSORS = {"mnist": "pixels", "image": "pixels", "audio": "waveform", "text": "ids"}
COPY = "mnist-copy"


@pytest.fixture(scope="module")
def client(served: Place) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.client.inference.removeprefix("http://"), concurrency=4) as connected:
        yield connected


def get(served: Place, path: str) -> requests.Response:
    return requests.get(f"{served.client.inference}/{path}", timeout=30)


def post(served: Place, path: str, **arguments: object) -> requests.Response:
    return requests.post(f"{served.client.inference}/{path}", timeout=60, **arguments)


def samples(model: ModelFolder, count: int = 1) -> triton.InferInput:
    files = numpy.array([model.sample_file.read_bytes()] * count, numpy.object_)
    return triton.InferInput("data", [count], "BYTES").set_data_from_numpy(files)


def native(served: Place, name: str) -> dict:
    return post(served, f"predictions/{name}", data=MODELS[name].sample_file.read_bytes()).json()


def same_class(answer: dict, expected: dict) -> bool:
    return first(answer)["class"] == first(expected)["class"]


# --- Triton's client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_tritons_client_gets_the_native_answers(served: Place, client: triton.InferenceServerClient, name: str):
    result = client.infer(name, [samples(MODELS[name], 3)], request_id="1")
    expected = native(served, name)
    assert result.get_response()["model_name"] == name
    answers = [json.loads(each) for each in result.as_numpy("json")]
    assert len(answers) == 3
    assert all(same_class(each, expected) for each in answers)
    again = client.infer(name, [samples(MODELS[name])], model_version="1.0")
    assert same_class(json.loads(again.as_numpy("json")[0]), expected)


@pytest.mark.parametrize("name", SHIPPED)
def test_metadata_describe_what_the_model_takes_and_returns(client: triton.InferenceServerClient, name: str):
    metadata = client.get_model_metadata(name, "1.0")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == (name, ["1.0"], "pytorch_torchscript")
    inputs = {each["name"]: each for each in metadata["inputs"]}
    assert list(inputs) == ["data", TENSORS[name]]
    tensor = inputs[TENSORS[name]]
    shape = [2, *(6 if size < 0 else size for size in tensor["shape"][1:])]
    dtype = {"UINT8": numpy.uint8, "FP32": numpy.float32, "INT64": numpy.int64}[tensor["datatype"]]
    given = triton.InferInput(tensor["name"], shape, tensor["datatype"]).set_data_from_numpy(numpy.ones(shape, dtype))
    result = client.infer(name, [given])
    for output in metadata["outputs"]:
        found = result.as_numpy(output["name"])
        assert found.shape[0] == 2
        assert result.get_output(output["name"])["datatype"] == output["datatype"]
        assert len(found.shape) == len(output["shape"])


def test_clients_of_all_protocols_share_a_server(served: Place, client: triton.InferenceServerClient):
    expected = native(served, "mnist")
    digit = MODELS["mnist"].sample_file.read_bytes()

    def ask(index: int) -> dict | str:
        if index % 4 == 0:
            return json.loads(client.infer("mnist", [samples(MODELS["mnist"])]).as_numpy("json")[0])
        if index % 4 == 1:
            bad = triton.InferInput("data", [1], "BYTES").set_data_from_numpy(numpy.array([b"no image"], numpy.object_))
            with pytest.raises(InferenceServerException) as raised:
                client.infer("mnist", [bad])
            return raised.value.status()
        return post(
            served, "predictions/mnist" if index % 4 == 2 else "invocations?model_name=mnist", data=digit
        ).json()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(64)))
    for index, answer in enumerate(answers):
        assert answer == "400" if index % 4 == 1 else same_class(answer, expected)


@pytest.mark.parametrize("compression", ["gzip", None])
def test_compressed_binary_tensors_are_read(served: Place, client: triton.InferenceServerClient, compression):
    result = client.infer("text", [samples(MODELS["text"])], request_compression_algorithm=compression)
    assert same_class(json.loads(result.as_numpy("json")[0]), native(served, "text"))


def test_errors_say_to_the_client_what_was_wrong(client: triton.InferenceServerClient):
    cases = [
        ("404", "nothing", samples(MODELS["mnist"]), {}, "nothing"),
        ("404", "mnist", samples(MODELS["mnist"]), {"model_version": "9.9"}, "9.9"),
        ("400", "mnist", samples(MODELS["mnist"]), {"parameters": {"topk": 1}}, '"topk"'),
        ("413", "mnist", samples(MODELS["mnist"], 33), {}, "at most 32"),
        ("415", "mnist", samples(MODELS["mnist"]), {"request_compression_algorithm": "deflate"}, "deflate"),
    ]
    for status, name, given, options, words in cases:
        with pytest.raises(InferenceServerException) as raised:
            client.infer(name, [given], **options)
        assert raised.value.status() == status
        assert words in raised.value.message()
        assert "decoding the response" not in raised.value.message()


# --- readiness ----------------------------------------------------------------------------------------------------


def test_server_and_its_models_are_ready(served: Place, client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", "1.0")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert get(served, "v1/models").json()["models"] == sorted(SHIPPED)
    assert get(served, "v1/models/mnist").json() == {"name": "mnist", "ready": True}


def test_model_without_workers_is_not_ready(served: Place, client: triton.InferenceServerClient):
    management = served.client.management
    registration = {"url": "mnist.mar", "model_name": COPY, "initial_workers": "0"}
    assert requests.post(f"{management}/models", params=registration, timeout=60).ok
    try:
        requests.put(f"{management}/models/{COPY}", params={"min_worker": 0, "synchronous": "true"}, timeout=60)
        assert not client.is_model_ready(COPY)
        answer = get(served, f"v1/models/{COPY}")
        assert (answer.status_code, answer.json()) == (503, {"name": COPY, "ready": False})
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="no workers") as raised:
            client.infer(COPY, [samples(MODELS["mnist"])])
        assert raised.value.status() == "503"
    finally:
        requests.delete(f"{management}/models/{COPY}", timeout=60)


# --- other routes -------------------------------------------------------------------------------------------------


def test_routes_of_kserve_v1_and_sagemaker_are_predictions(served: Place):
    digit = MODELS["mnist"].sample_file.read_bytes()
    expected = native(served, "mnist")
    for path in ("invocations?model_name=mnist", "models/mnist/invoke", "v1/models/mnist:predict"):
        answer = post(served, path, data=digit)
        assert same_class(answer.json(), expected), path
    answer = post(served, "invocations?top_k=1&model_name=text", data=MODELS["text"].sample_file.read_bytes())
    assert len(answer.json()["top_k"]) == 1
    assert post(served, "invocations", data=digit).status_code == 400


def test_explanation_is_a_tensor_of_json(served: Place):
    body = {"inputs": [{"name": "data", "shape": [1], "datatype": "BYTES", "data": ["a good film"]}]}
    for path in ("v2/models/text/explain", "v2/models/text/versions/1.0/explain"):
        [output] = post(served, path, json=body).json()["outputs"]
        assert (output["name"], output["shape"]) == ("json", [1])
        assert "tokens" in json.loads(output["data"][0]) or "words" in json.loads(output["data"][0])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "v2/models/mnist/infer", 405),
        ("POST", "v2/models/mnist", 405),
        ("GET", "v2/models/nothing", 404),
        ("GET", "v2/models/mnist/versions/9.9/ready", 404),
        ("GET", "v2/models/mnist/config", 404),
        ("POST", "v2/models/mnist/infer/more", 404),
        ("POST", "v2/models/mnist/versions/infer", 405),
        ("GET", "v2/health", 404),
        ("GET", "v2/health/well", 404),
        ("POST", "v2/repository/index", 404),
    ],
)
def test_unknown_route_is_an_error_of_the_protocol(served: Place, method: str, path: str, status: int):
    answer = requests.request(method, f"{served.client.inference}/{path}", timeout=30)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


def test_client_cannot_choose_the_protocol_by_a_header(served: Place):
    answer = post(served, "predictions/mnist", data=b"no image", headers={"Bundle-Protocol": "v2"})
    assert answer.json()["type"] == "UndecodableImage"
