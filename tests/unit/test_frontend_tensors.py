"""Requests over gRPC become those of HTTP, and the handler's answers become those of gRPC: Tensors.java alone."""

import base64
import json
from typing import Any

import numpy
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as messages

from bundle.build import frontend as building
from bundle.paths import ROOT
from bundle.server.frontend import JAR
from handlers.core import tensor_data
from handlers.core.declared import Column
from handlers.core.open_inference import JSON_SIZE, PROTOCOL
from handlers.core.tensor_answers import Respond
from tests.unit.test_frontend import NO_COMPILER, compile_java, run_java

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no JDK")]
# reads each "request=FILE", and each "answer=FILE" with the length of its JSON; prints the result
PROGRAM = """
package bundle.frontend;

import java.nio.file.*;
import java.util.*;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferRequest;
import org.pytorch.serve.util.ConfigManager;

public class Convert {
    public static void main(String[] given) throws Exception {
        var arguments = new ConfigManager.Arguments();
        arguments.setModelStore(System.getProperty("user.dir"));
        ConfigManager.init(arguments);
        for (String each : given) {
            String[] parts = each.split("=");
            byte[] content = Files.readAllBytes(Path.of(parts[1]));
            String shown;
            try {
                if (parts[0].equals("request")) {
                    var input = Tensors.request(ModelInferRequest.parseFrom(content));
                    shown = input.getHeaders().get("bundle-protocol") + "\\t"
                            + input.getHeaders().get("Inference-Header-Content-Length") + "\\t"
                            + Base64.getEncoder().encodeToString(input.getParameters().get(0).getValue());
                } else {
                    var answer = Tensors.response(content, Map.of("Inference-Header-Content-Length", parts[2]));
                    shown = "answer\\t0\\t" + Base64.getEncoder().encodeToString(answer.toByteArray());
                }
            } catch (org.pytorch.serve.http.BadRequestException error) {
                shown = "rejected\\t0\\t" + Base64.getEncoder().encodeToString(error.getMessage().getBytes());
            }
            System.out.println("RESULT\\t" + shown);
        }
    }
}
"""
FIELDS = {  # datatype: the field of the elements, and elements at the limits of the datatype
    "BOOL": ("bool_contents", [True, False, True]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-32768, 32767]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "FP32": ("fp32_contents", [0.1, -1.5, 3.4e38]),
    "FP64": ("fp64_contents", [0.1, -1.5, 1.7e308]),
    "BYTES": ("bytes_contents", [b"", b"\x00\xff", b"text"]),
}
OUTSIDE = {"UINT8": ("uint_contents", 256), "UINT16": ("uint_contents", 2**32 - 1), "INT8": ("int_contents", -129)}
LIMIT = 1000  # bytes of a request
REJECTED = "rejected"


def typed(datatype: str, field: str, elements: list) -> Any:
    request = messages.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[len(elements)])
    getattr(tensor.contents, field).extend(elements)
    return request


def with_parameters() -> Any:
    request = typed("BYTES", "bytes_contents", [b"a"])
    request.id = "7"
    for field, value in {
        "bool": True,
        "int64": -(2**63),
        "string": 'é"\n',
        "double": 0.25,
        "uint64": 2**64 - 1,
    }.items():
        setattr(request.parameters[field], f"{field}_param", value)
    request.parameters["binary_data_output"].bool_param = False
    request.parameters["nothing"].SetInParent()
    request.inputs[0].parameters["binary_data_size"].int64_param = 1
    request.inputs[0].parameters["content_type"].string_param = "base64"
    request.outputs.add(name="json").parameters["classification"].int64_param = 3
    return request


def raw(*contents: bytes, inputs: int = 1, typed_too: bool = False) -> Any:
    request = messages.ModelInferRequest(model_name="m", raw_input_contents=contents)
    for index in range(inputs):
        request.inputs.add(name=f"x{index}", datatype="UINT8", shape=[2])
    if typed_too:
        request.inputs[0].contents.uint_contents.extend([1, 2])
    return request


def many(inputs: int = 1, outputs: int = 0, dimensions: int = 1, parameters: int = 0) -> Any:
    request = messages.ModelInferRequest(model_name="m")
    for _ in range(inputs):
        request.inputs.add().shape.extend([1] * dimensions)
    for _ in range(outputs):
        request.outputs.add()
    for index in range(parameters):
        request.inputs[0].parameters[str(index)].bool_param = True
    return request


REQUESTS = {
    **{datatype: typed(datatype, *each) for datatype, each in FIELDS.items()},
    **{f"outside {datatype}": typed(datatype, field, [each]) for datatype, (field, each) in OUTSIDE.items()},
    "parameters": with_parameters(),
    "raw": raw(b"ab", b"cde", inputs=2),
    "raw without an input": raw(b"ab", b"cd"),
    "raw and typed": raw(b"ab", typed_too=True),
    "inputs": many(inputs=101),
    "outputs": many(outputs=101),
    "dimensions": many(dimensions=9),
    "parameters of an input": many(parameters=101),
    "large numbers": typed("INT64", "int64_contents", [0] * (LIMIT // 8 + 1)),  # short in the message
    "large bytes": typed("BYTES", "bytes_contents", [b""] * (LIMIT // 4 + 1)),
    "bytes without a field": typed("FP16", "fp32_contents", [1]),
}
ANSWERS = [{"label": ["a", "bé"], "score": [0.5, 0.25]}, {"label": ["c"], "score": [1.0]}]
COLUMNS = (Column("label", "BYTES", ("label",)), Column("score", "FP32", ("score",)))


def response(identity: str | None) -> tuple[bytes, int]:
    """Return a handler's answer, and the length of its JSON."""
    outputs = (("label", True), ("score", True), ("json", True))
    body, _, size = Respond("m", "1.0", identity, outputs, COLUMNS)(ANSWERS)
    assert isinstance(body, bytes)
    assert size is not None
    return body, size


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, bytes]]:
    """Return what Java makes of each request and answer: the protocol, the length of the JSON, and the body."""
    folder = tmp_path_factory.mktemp("tensors")
    torchserve = building.torchserve_jar()
    compile_java(folder, PROGRAM, f"{JAR}:{torchserve}")
    (folder / "config.properties").write_text(
        f"metrics_config={ROOT / 'bundle' / 'config' / 'metrics.yaml'}\nmax_request_size={LIMIT}\n"
    )
    (folder / "ts").mkdir()
    (folder / "ts" / "version.txt").write_text((torchserve.parents[1] / "version.txt").read_text())
    given = []
    for index, request in enumerate(REQUESTS.values()):
        file = folder / f"{index}.request"
        file.write_bytes(request.SerializeToString())
        given.append(f"request={file}")
    for identity in ("7", None):
        body, size = response(identity)
        file = folder / f"{identity}.answer"
        file.write_bytes(body)
        given.append(f"answer={file}={size}")
    config = f"-DtsConfigFile={folder / 'config.properties'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = run_java(config, "-cp", f"{folder}:{JAR}:{torchserve}", "bundle.frontend.Convert", *given)
    found = [line.split("\t")[1:] for line in printed.splitlines() if line.startswith("RESULT")]
    names = [*REQUESTS, "answer 7", "answer None"]
    return {
        name: (kind, int(size), base64.b64decode(body)) for name, (kind, size, body) in zip(names, found, strict=True)
    }


def document(result: tuple[str, int, bytes]) -> tuple[dict, memoryview]:
    """Return the JSON of a request, and the bytes of its tensors."""
    protocol, size, body = result
    assert protocol == "v2", body
    return json.loads(body[:size]), memoryview(body)[size:]


def test_names_of_the_headers_are_those_that_the_handler_reads():
    assert f'"{JSON_SIZE}"' in PROGRAM
    assert f'"{PROTOCOL}"' in PROGRAM


@pytest.mark.parametrize("datatype", FIELDS)
def test_typed_elements_become_a_binary_tensor(results, datatype: str):
    elements = FIELDS[datatype][1]
    asked, content = document(results[datatype])
    [tensor] = asked["inputs"]
    assert tensor == {
        "name": "x",
        "datatype": datatype,
        "shape": [len(elements)],
        "parameters": {"binary_data_size": len(content)},
    }
    values = tensor_data.from_binary("x", datatype, tensor["shape"], content)
    expected = elements if datatype == "BYTES" else numpy.array(elements, tensor_data.NUMBERS[datatype]).tolist()
    assert list(values if datatype == "BYTES" else values.tolist()) == expected


def test_raw_contents_follow_the_json_in_the_order_of_the_inputs(results):
    asked, content = document(results["raw"])
    assert [each["parameters"]["binary_data_size"] for each in asked["inputs"]] == [2, 3]
    assert bytes(content) == b"abcde"
    assert asked["parameters"] == {"binary_data_output": True}
    assert asked.keys() == {"parameters", "inputs"}


def test_parameters_of_all_kinds_are_kept_and_all_outputs_are_binary(results):
    asked, content = document(results["parameters"])
    assert asked["id"] == "7"
    assert asked["parameters"] == {
        "bool": True,
        "int64": -(2**63),
        "string": 'é"\n',
        "double": 0.25,
        "uint64": 2**64 - 1,
        "nothing": None,
        "binary_data_output": True,
    }
    assert asked["inputs"][0]["parameters"] == {"binary_data_size": len(content), "content_type": "base64"}
    assert asked["outputs"] == [{"name": "json", "parameters": {"classification": 3, "binary_data": True}}]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((f"outside {datatype}", "a number that its datatype does not have") for datatype in OUTSIDE),
        ("raw without an input", "raw_input_contents must have one element for each input"),
        ("raw and typed", "in raw_input_contents, or of none"),
        ("inputs", "At most 100 inputs are accepted, not 101"),
        ("outputs", "At most 100 outputs"),
        ("dimensions", "At most 8 dimensions"),
        ("parameters of an input", "At most 100 parameters"),
        ("large numbers", "max_request_size"),
        ("large bytes", "max_request_size"),
    ],
)
def test_request_that_has_no_form_of_http_is_rejected(results, name: str, words: str):
    kind, _, message = results[name]
    assert (kind, words in message.decode()) == (REJECTED, True), message


def test_elements_without_a_field_are_none(results):
    asked, content = document(results["bytes without a field"])
    assert (asked["inputs"][0]["datatype"], len(content)) == ("FP16", 0)


@pytest.mark.parametrize("identity", ["7", None])
def test_answer_has_the_handlers_tensors_as_raw_contents(results, identity: str | None):
    _, _, content = results[f"answer {identity}"]
    answer = messages.ModelInferResponse.FromString(content)
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "1.0", identity or "")
    result = triton.InferResult(answer)
    labels = [[each.decode() for each in row] for row in result.as_numpy("label")]
    assert labels == [["a", "bé"], ["c", ""]]
    assert result.as_numpy("score").tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert [json.loads(each) for each in result.as_numpy("json")] == ANSWERS
    assert [each.datatype for each in answer.outputs] == ["BYTES", "FP32", "BYTES"]
