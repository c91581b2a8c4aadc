"""The routes of KServe and SageMaker on a real server, with Triton's and KServe's own clients and with raw requests."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import requests
import tritonclient.http as triton
from tritonclient.http import InferRequestedOutput as Output
from tritonclient.utils import InferenceServerException

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.samples import first
from handlers.mnist import MNISTHandler
from loadtest.bench.systems.environment import Environment
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.support import batches, repeated

SAMPLES = {model.name: model.sample_file.read_bytes() for model in select(SHIPPED)}
EXPECTED = {model.name: model.bundle.expect for model in select(SHIPPED)}
ENCODED = {name: base64.b64encode(sample).decode() for name, sample in SAMPLES.items()}
TENSORS = {"mnist": "pixels", "image": "pixels", "audio": "waveform", "text": "ids"}
QUICK = dict.fromkeys(SHIPPED, "saliency") | {"text": "feature_ablation"}  # methods of explanations
DTYPES = {"UINT8": numpy.uint8, "INT64": numpy.int64, "FP32": numpy.float32}
NO_IMAGE = b"no image"
MNIST = SAMPLES["mnist"]


def connect(url: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(url.removeprefix("http://"))


@pytest.fixture
def client(served: Place) -> Iterator[triton.InferenceServerClient]:
    with connect(served.client.inference) as connected:
        yield connected


def grpc_address(served: Place) -> str:
    return f"127.0.0.1:{served.ports['grpc_inference_port']}"


def get(served: Place, path: str) -> requests.Response:
    return requests.get(f"{served.client.inference}/{path}", timeout=30)


def post(served: Place, path: str, **arguments: Any) -> requests.Response:
    return requests.post(f"{served.client.inference}/{path}", timeout=60, **arguments)


def files(*contents: bytes) -> triton.InferInput:
    array = numpy.array(contents, numpy.object_)
    return triton.InferInput("data", [len(contents)], "BYTES").set_data_from_numpy(array)


def tensor(name: str, datatype: str, shape: list[int]) -> triton.InferInput:
    ones = numpy.ones(shape, DTYPES[datatype])
    return triton.InferInput(name, shape, datatype).set_data_from_numpy(ones)


def prepared(digit: bytes) -> numpy.ndarray:
    """Return the tensor that MNIST's handler makes of a file: uint8 [1, 1, 28, 28]."""
    handler = MNISTHandler()
    handler.settings = handler.Settings()
    return handler.decode(handler.Inputs(data=digit)).tensors.numpy()[None]


def labels(texts: Any) -> list[str]:
    """Return the first label of each answer in the output `json`."""
    return [first(json.loads(each)).label for each in texts]


# --- Triton's client ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_tritons_client_gets_the_answers_of_a_batch(served: Place, client: triton.InferenceServerClient, name: str):
    result = client.infer(name, [files(*[SAMPLES[name]] * 3)], request_id="1")
    assert (result.get_response()["model_name"], result.get_response()["id"]) == (name, "1")
    assert labels(result.as_numpy("json")) == [EXPECTED[name]] * 3
    asked = [Output("json", binary_data=False)]
    result = client.infer(name, [files(SAMPLES[name])], model_version="1.0", outputs=asked)
    assert labels(result.as_numpy("json")) == [EXPECTED[name]]
    assert [each["name"] for each in result.get_response()["outputs"]] == ["json"]


@pytest.mark.parametrize("name", SHIPPED)
def test_metadata_describe_what_the_model_takes_and_returns(client: triton.InferenceServerClient, name: str):
    metadata = client.get_model_metadata(name, "1.0")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == (name, ["1.0"], "pytorch_torchscript")
    described = {each["name"]: each for each in metadata["inputs"]}
    assert list(described) == ["data", TENSORS[name]]
    taken = described[TENSORS[name]]
    shape = [2, *(6 if size < 0 else size for size in taken["shape"][1:])]
    result = client.infer(name, [tensor(taken["name"], taken["datatype"], shape)])
    assert [each["name"] for each in result.get_response()["outputs"]] == [each["name"] for each in metadata["outputs"]]
    for output in metadata["outputs"]:
        found = result.as_numpy(output["name"])
        assert result.get_output(output["name"])["datatype"] == output["datatype"]
        assert (found.shape[0], found.ndim) == (2, len(output["shape"]))


def test_pixels_that_the_client_prepared_get_the_answer_of_the_file(client: triton.InferenceServerClient):
    pixels = prepared(MNIST)
    given = triton.InferInput("pixels", list(pixels.shape), "UINT8").set_data_from_numpy(pixels)
    result = client.infer("mnist", [given])
    expected = client.infer("mnist", [files(MNIST)])
    assert result.as_numpy("top_3_classes").tolist() == expected.as_numpy("top_3_classes").tolist()
    assert result.as_numpy("top_3_probabilities") == pytest.approx(expected.as_numpy("top_3_probabilities"), abs=0.02)


def test_parameters_are_the_options_of_the_model(client: triton.InferenceServerClient):
    result = client.infer("image", [files(SAMPLES["image"])], parameters={"top_k": 2}, priority=1, timeout=10**6)
    assert result.as_numpy("label").shape == (1, 2)
    assert result.as_numpy("label")[0, 0].decode() == EXPECTED["image"]
    assert result.as_numpy("probability").dtype == numpy.float32


def test_compressed_binary_tensors_are_read(client: triton.InferenceServerClient):
    result = client.infer("text", [files(SAMPLES["text"])], request_compression_algorithm="gzip")
    assert labels(result.as_numpy("json")) == [EXPECTED["text"]]


MISTAKES: list[tuple[str, str, triton.InferInput, dict, str]] = [
    ("404", "nothing", files(MNIST), {}, "nothing"),
    ("404", "mnist", files(MNIST), {"model_version": "9.9"}, "9.9"),
    ("400", "mnist", files(NO_IMAGE), {}, "not an image"),
    ("400", "mnist", files(MNIST, b""), {}, '"data" is empty'),
    ("400", "audio", files(NO_IMAGE), {}, "sound"),
    ("400", "mnist", tensor("data", "UINT8", [1, 28]), {}, 'datatype of "data" must be BYTES, not UINT8'),
    ("400", "mnist", tensor("pixels", "FP32", [1, 1, 28, 28]), {}, "must be UINT8 [N, 1, 28, 28], not FP32"),
    ("400", "image", tensor("pixels", "UINT8", [1, 3, 16, 16]), {}, "[N, 3, 32, 32], not UINT8 [1, 3, 16, 16]"),
    ("400", "audio", tensor("waveform", "FP32", [16000]), {}, "FP32 [N, 16000]"),
    ("400", "text", tensor("tokens", "INT64", [1, 6]), {}, 'Accepted inputs: "data" (BYTES), or "ids" (INT64)'),
    ("400", "mnist", files(MNIST), {"parameters": {"topk": 1}}, '"topk"'),
    ("400", "image", files(SAMPLES["image"]), {"parameters": {"top_k": 10**6}}, "top_k must be between 1 and"),
    ("400", "text", files(SAMPLES["text"]), {"outputs": [Output("logits")]}, '"label"'),
    ("400", "text", files(SAMPLES["text"]), {"outputs": [Output("label", class_count=2)]}, '"classification"'),
    ("413", "mnist", files(*[MNIST] * 33), {}, "at most 32"),
    ("415", "mnist", files(MNIST), {"request_compression_algorithm": "deflate"}, "deflate"),
]


@pytest.mark.parametrize(("status", "model", "given", "options", "words"), MISTAKES)
def test_error_says_to_the_client_what_was_wrong(client, status, model, given, options, words):
    with pytest.raises(InferenceServerException) as raised:
        client.infer(model, [given], **options)
    assert raised.value.status() == status
    assert words in raised.value.message()
    assert "decoding the response" not in raised.value.message()


# --- KServe's client ----------------------------------------------------------------------------------------------


def infer(model: str, *inputs: dict, **more: Any) -> dict:
    return {"protocol": "v2", "method": "infer", "model": model, "inputs": inputs, **more}


def first_protocol(call: str, model: str, **data: Any) -> dict:
    return {"protocol": "v1", "method": call, "model": model, "data": data}


def data(*encoded: str, **more: Any) -> dict:
    return {"name": "data", "datatype": "BYTES", "data": encoded, **more}


@pytest.fixture(scope="module")
def kserve_python() -> Path:
    """Python with KServe's client, whose packages do not fit into the environment of the tests."""
    environment = Environment(ROOT / "build" / "kserve", ROOT / "requirements" / "kserve.txt")
    environment.install()
    return environment.python


@pytest.fixture(scope="module")
def kserve(served: Place, kserve_python: Path) -> dict[str, Any]:
    """The results of all calls of KServe's client, which were made at the same time."""
    bad = base64.b64encode(NO_IMAGE).decode()
    calls = {
        "live": {"protocol": "v2", "method": "is_server_live"},
        "live in v1": {"protocol": "v1", "method": "is_server_live"},
        "ready": {"protocol": "v2", "method": "is_server_ready"},
        "unknown model is ready": {"protocol": "v2", "method": "is_model_ready", "model": "nothing"},
        "options": infer("image", data(ENCODED["image"]), parameters={"top_k": 2}),
        "pixels": infer("mnist", {"name": "pixels", "datatype": "UINT8", "data": prepared(MNIST).tolist()}),
        "no such model": infer("nothing", data(bad)),
        "no image": infer("mnist", data(bad)),
        "datatype": infer("mnist", {"name": "pixels", "datatype": "FP32", "data": [[[[0.5]]]]}),
        "shape": infer("mnist", {"name": "pixels", "datatype": "UINT8", "data": [[[[1]]]]}),
        "option": infer("image", data(ENCODED["image"]), parameters={"top_k": 0}),
        "no image in v1": first_protocol("infer", "mnist", instances=[bad]),
        "no such model in v1": first_protocol("infer", "nothing", instances=[bad]),
    }
    for name, encoded in ENCODED.items():
        value = SAMPLES[name].decode() if name == "text" else encoded
        calls |= {
            f"{name} is ready": {"protocol": "v2", "method": "is_model_ready", "model": name},
            f"{name} is ready in v1": {"protocol": "v1", "method": "is_model_ready", "model": name},
            f"{name} binary": infer(name, data(*[encoded] * 3)),
            f"{name} json": infer(name, data(encoded, encoded, binary=False, content_type="base64")),
            f"{name} v1": first_protocol("infer", name, instances=[value, value]),
            f"{name} explained": first_protocol("explain", name, instances=[value], method=QUICK[name]),
        }
    second = {name: call for name, call in calls.items() if call["protocol"] == "v2"}
    calls |= {f"{name} over grpc": call | {"protocol": "grpc"} for name, call in second.items()}
    addresses = [served.client.inference, grpc_address(served)]
    program = [kserve_python, Path(__file__).with_name("kserve_calls.py"), *addresses]
    done = subprocess.run(program, input=json.dumps(calls), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SHIPPED)
def test_kserves_client_gets_the_answers_of_a_batch(kserve: dict[str, Any], name: str):
    assert labels(kserve[f"{name} binary"]["json"]) == [EXPECTED[name]] * 3
    assert labels(kserve[f"{name} json"]["json"]) == [EXPECTED[name]] * 2
    assert [first(each).label for each in kserve[f"{name} v1"]["predictions"]] == [EXPECTED[name]] * 2
    assert [each["target"]["label"] for each in kserve[f"{name} explained"]["predictions"]] == [EXPECTED[name]]
    assert kserve[f"{name} is ready"] is kserve[f"{name} is ready in v1"] is True


def test_kserves_client_gets_readiness_options_and_errors(kserve: dict[str, Any]):
    assert kserve["live"] is kserve["live in v1"] is kserve["ready"] is True
    assert kserve["unknown model is ready"] is False
    assert numpy.shape(kserve["options"]["label"]) == (1, 2)
    assert labels(kserve["pixels"]["json"]) == [EXPECTED["mnist"]]
    errors = {
        "no such model": (404, "Model not found: nothing"),
        "no such model in v1": (404, "Model not found: nothing"),
        "no image": (400, "not an image"),
        "no image in v1": (400, "not an image"),
        "datatype": (400, "must be UINT8 [N, 1, 28, 28], not FP32 [1, 1, 1, 1]"),
        "shape": (400, "must be UINT8 [N, 1, 28, 28], not UINT8 [1, 1, 1, 1]"),
        "option": (400, "top_k must be"),
    }
    for name, (status, words) in errors.items():
        assert kserve[name]["status"] == status, name
        assert words in kserve[name]["error"], name


@pytest.mark.parametrize("name", SHIPPED)
def test_kserves_grpc_client_gets_the_answers_of_a_batch(kserve: dict[str, Any], name: str):
    assert labels(kserve[f"{name} binary over grpc"]["json"]) == [EXPECTED[name]] * 3
    assert labels(kserve[f"{name} json over grpc"]["json"]) == [EXPECTED[name]] * 2
    assert kserve[f"{name} is ready over grpc"] is True


def test_kserves_grpc_client_gets_readiness_options_and_errors(kserve: dict[str, Any]):
    assert kserve["live over grpc"] is kserve["ready over grpc"] is True
    assert numpy.shape(kserve["options over grpc"]["label"]) == (1, 2)
    assert labels(kserve["pixels over grpc"]["json"]) == [EXPECTED["mnist"]]
    errors = {
        "unknown model is ready": ("NOT_FOUND", "Model not found: nothing"),
        "no such model": ("NOT_FOUND", "Model not found: nothing"),
        "no image": ("INVALID_ARGUMENT", "not an image"),
        "datatype": ("INVALID_ARGUMENT", "must be UINT8 [N, 1, 28, 28], not FP32 [1, 1, 1, 1]"),
        "option": ("INVALID_ARGUMENT", "top_k must be"),
    }
    for name, (status, words) in errors.items():
        result = kserve[f"{name} over grpc"]
        assert (result["status"], words in result["error"]) == (status, True), (name, result)


def test_examples_of_the_documentation_run(served: Place, kserve_python: Path):
    page = (ROOT / "docs" / "protocols.md").read_text()
    for port, key in (("8080", "inference_address"), ("7070", "grpc_inference_port")):
        page = page.replace(f"127.0.0.1:{port}", f"127.0.0.1:{served.ports[key]}")
    printed = {"models/image": EXPECTED["image"], "models/text": '"outputs"', "models/mnist": "top_3_classes"}
    for language, code in re.findall(r"```(python|sh)\n(.*?)```", page, re.DOTALL):
        python = kserve_python if "kserve" in code else sys.executable
        program = ["sh", "-c", code] if language == "sh" else [python, "-c", code]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
        words = next(words for model, words in printed.items() if model in code)
        assert (done.returncode, words in done.stdout) == (0, True), done.stdout + done.stderr


# --- batches ------------------------------------------------------------------------------------------------------


def test_requests_of_all_protocols_share_batches_and_fail_alone(served: Place):
    def open_inference(content: bytes) -> str:
        with connect(served.client.inference) as client:  # one for each request, because a client belongs to one thread
            try:
                return labels(client.infer("mnist", [files(content)]).as_numpy("json"))[0]
            except InferenceServerException as error:
                return error.status()

    def raw(path: str, **sent: Any) -> str:
        answer = post(served, path, **sent)
        if answer.status_code != 200:
            return str(answer.status_code)
        [ranked] = answer.json().get("predictions", [answer.json()])
        return first(ranked).label

    ways = [
        (partial(open_inference, MNIST), "3"),
        (partial(open_inference, NO_IMAGE), "400"),
        (partial(raw, "predictions/mnist", data=MNIST), "3"),
        (partial(raw, "predictions/mnist", data=NO_IMAGE), "400"),
        (partial(raw, "v1/models/mnist:predict", json={"instances": [ENCODED["mnist"]]}), "3"),
        (partial(raw, "v1/models/mnist:predict", json={"instances": [3]}), "400"),
        (partial(raw, "invocations?model_name=mnist", data=MNIST), "3"),
        (partial(raw, "models/mnist/invoke", data=NO_IMAGE), "400"),
    ]
    metrics = served.url("metrics_address")
    ways_taken = ways * 24
    count, requests_before = batches(metrics, "mnist")
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda way: way[0](), ways_taken))
    assert answers == [expected for _, expected in ways_taken]
    more, requests_after = batches(metrics, "mnist", requests_before + len(ways_taken))
    assert requests_after - requests_before == len(ways_taken)
    assert more - count < len(ways_taken), "no requests shared a batch"


# --- readiness ----------------------------------------------------------------------------------------------------


def test_server_and_its_models_are_ready(served: Place, client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", "1.0")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert get(served, "v1/models").json()["models"] == sorted(SHIPPED)
    assert get(served, "v1/models/mnist").json() == {"name": "mnist", "ready": True}
    assert get(served, "ping").json() == {"status": "Healthy"}


def test_root_is_alive_on_the_port_of_predictions_only(served: Place):
    assert get(served, "").json() == {"status": "alive"}
    assert "openapi" in requests.options(f"{served.client.inference}/", timeout=30).json()
    assert post(served, "").status_code == 405
    for address in (served.client.management, served.url("metrics_address")):
        assert requests.get(f"{address}/", timeout=30).status_code == 405


# --- other routes -------------------------------------------------------------------------------------------------


def test_routes_of_kserve_v1_and_sagemaker_are_predictions(served: Place):
    for path in ("invocations?model_name=mnist", "models/mnist/invoke", "v1/models/mnist:predict"):
        assert first(post(served, path, data=MNIST).json()).label == "3", path
    answer = post(served, "invocations?top_k=1&model_name=text", data=SAMPLES["text"])
    assert len(answer.json()["top_k"]) == 1
    for path in ("invocations", "invocations?model_name="):
        assert post(served, path, data=MNIST).status_code == 400


def test_explanation_is_json_or_a_picture(served: Place):
    options = {"method": "integrated_gradients", "target": EXPECTED["mnist"], "n_steps": 20}
    body = {"inputs": [{"name": "data", "shape": [2], "datatype": "BYTES", "data": [ENCODED["mnist"]] * 2}]}

    def explained(path: str, options: dict) -> requests.Response:
        return repeated(lambda: post(served, path, json={**body, "parameters": options}))

    for path in ("v2/models/mnist/explain", "v2/models/mnist/versions/1.0/explain"):
        [output] = explained(path, options).json()["outputs"]
        assert (output["name"], output["shape"]) == ("json", [2])
        assert [json.loads(each)["method"] for each in output["data"]] == ["integrated_gradients"] * 2
    [output] = explained("v2/models/mnist/explain", options | {"format": "png"}).json()["outputs"]
    assert (output["name"], output["shape"]) == ("picture", [2])
    assert all(base64.b64decode(each).startswith(b"\x89PNG") for each in output["data"])


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
    answer = post(served, "predictions/mnist", data=NO_IMAGE, headers={"Bundle-Protocol": "v2"})
    assert answer.json()["type"] == "UndecodableImage"
