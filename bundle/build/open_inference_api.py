"""The Open Inference Protocol in a model's OpenAPI document, made from the metadata that clients of it get."""

import json
from typing import Any, cast

from bundle import openapi
from bundle.errors import BundleError
from bundle.openapi import FILE, JSON, OCTETS, OPEN_INFERENCE, component, record
from handlers.core.declared import JSON as WHOLE
from handlers.core.declared import PICTURE, columns, metadata
from handlers.core.open_inference import BINARY_OUTPUT, IGNORED, JSON_SIZE
from handlers.core.slots import Answer
from handlers.core.tensor_answers import BASE64, Respond
from handlers.core.tensor_data import BOOL, BYTES

SIZE = {"binary_data_size": {"type": "integer", "minimum": 0, "description": "bytes of its binary tensor"}}
TEXT, FLAG = {"type": "string"}, {"type": "boolean"}


class OpenInferenceAPI:
    """Make the operations of one model.

    Args:
        name, version: of the model.
        handler: with its settings.

    Attributes:
        schemas: components that `inference` has made, by name.
    """

    def __init__(self, name: str, version: str, handler: Any):
        self.name, self.version, self.handler = name, version, handler
        self.path = f"/v2/models/{name}"
        self.metadata = metadata(handler)
        self.schemas: dict[str, dict] = {}

    def questions(self) -> dict[str, dict]:
        """Return the paths that say what the model takes and returns, and whether it is ready."""
        example = {"name": self.name, "versions": [self.version], **self.metadata}
        about = openapi.described("Its metadata.", component(f"{OPEN_INFERENCE}Model"), example=example)
        missing = {"404": {"$ref": f"#/components/responses/{OPEN_INFERENCE}Error404"}}
        ready = openapi.readiness("It is", component("ModelReady")) | missing
        asked = {
            "": ("metadata", f"Inputs and outputs of the model {self.name}.", {"200": about} | missing),
            "/ready": ("ready", f"Whether the model is ready: {self.name}.", ready),
        }
        paths: dict[str, dict] = {}
        for suffix, (word, summary, answers) in asked.items():
            paths |= self.both(word, suffix, "get", {"summary": summary, "responses": answers})
        return paths

    def both(self, word: str, suffix: str, method: str, operation: dict) -> dict[str, dict]:
        """Return the paths of an operation, without and with the version."""
        operation = {"tags": [self.name], **operation}
        plain, version = ({"operationId": f"{word}{way}_{self.name}", **operation} for way in ("", "OfVersion"))
        return {
            self.path + suffix: {method: plain},
            f"{self.path}/versions/{{version}}{suffix}": openapi.versioned(self.name, {method: version}),
        }

    def inference(self, verb: str, options: dict[str, dict], pictures: bool) -> dict[str, dict]:
        """Return the paths of an inference.

        Args:
            verb: "infer" or "explain".
            options: the schema of each option.
            pictures: whether an option asks for a picture.
        """
        explains = verb == "explain"
        inputs = [each for each in self.metadata["inputs"] if not explains or each["name"] in self.fields]
        outputs = [each for each in self.metadata["outputs"] if not explains or each["name"] == WHOLE]
        if pictures:
            outputs = [*outputs, {"name": PICTURE, "datatype": BYTES, "shape": [-1]}]
        word = verb.capitalize() if not explains else "InferExplain"
        request, answer = f"{self.name}-{word}Request", f"{self.name}-{word}Answer"
        self.schemas[request] = self.request(inputs, outputs, options)
        tensors = {"type": "array", "items": any_of([output_tensor(each) for each in outputs])}
        self.schemas[answer] = record({"model_name": TEXT, "model_version": TEXT, "outputs": tensors}, id=TEXT)
        binary = {"schema": FILE | {"description": f"JSON, and binary tensors after it; {JSON_SIZE} says where."}}
        size = {
            "name": JSON_SIZE,
            "in": "header",
            "description": "Bytes of JSON at the beginning of a body with binary tensors. 0: the body is one file.",
            "schema": {"type": "integer", "minimum": 0},
        }
        answered = {"description": "A tensor for each output.", "headers": {JSON_SIZE: {"schema": size["schema"]}}}
        operation = {
            "summary": f"{'Explain the answer of' if explains else 'Ask'} the model {self.name}.",
            "description": "The Open Inference Protocol (v2). Each element of an input is one sample.",
            "parameters": [size],
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": component(request)}, OCTETS: dict(binary)},
            },
            "responses": {"200": answered | {"content": {JSON: {"schema": component(answer)}, OCTETS: dict(binary)}}}
            | openapi.error_references(OPEN_INFERENCE),
        }
        return self.both(f"{verb}V2", f"/{verb}", "post", operation)

    @property
    def fields(self) -> set[str]:
        return set(self.handler.Inputs.model_fields)

    def request(self, inputs: list[dict], outputs: list[dict], options: dict[str, dict]) -> dict:
        most = self.handler.settings.max_instances
        ignored = {name: {"description": "It has no effect."} for name in sorted(IGNORED)}
        parameters = {"type": "object", "properties": ignored | {BINARY_OUTPUT: FLAG} | options}
        asked = record(
            {"name": {"type": "string", "enum": [each["name"] for each in outputs]}},
            parameters={"type": "object", "properties": {"binary_data": FLAG}},
        )
        tensors = [input_tensor(each, each["name"] in self.fields, most) for each in inputs]
        return record(
            {"inputs": {"type": "array", "items": any_of(tensors), "minItems": 1}},
            id=TEXT,
            parameters=parameters | {"additionalProperties": False},
            outputs={"type": "array", "items": asked, "description": "those that the answer has; by default, all"},
        )

    def examples(self, request: dict | None, answer: object) -> dict[str, object]:
        """Return the sample and the answer in the protocol's form.

        Args:
            request: the sample as JSON, {field: value}; None without one.
            answer: to it; None without one.

        Raises:
            BundleError: the answer has not what the handler declares as `columns`.
        """
        found: dict[str, object] = {}
        if request and request.keys() <= self.fields:
            texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in request.items()}
            inputs = [{"name": name, "datatype": BYTES, "shape": [1], "data": [text]} for name, text in texts.items()]
            found["inferRequest"] = {"inputs": inputs}
        if answer is not None:
            declared = columns(self.handler)
            asked = tuple((name, False) for name in [*(each.name for each in declared), WHOLE])
            try:
                response = Respond(self.name, self.version, None, asked, declared)([cast("Answer", answer)])
            except (LookupError, TypeError, ValueError) as exc:
                raise BundleError(
                    f"{self.name}: the columns of {type(self.handler).__name__} are not those of its answer to the "
                    f"sample: {type(exc).__name__}: {exc}"
                ) from exc
            found["inferAnswer"] = json.loads(response.body)
        return found


def any_of(schemas: list[dict]) -> dict:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def element(datatype: str) -> dict:
    """Return the schema of an element in JSON."""
    if datatype in (BYTES, BOOL):
        return TEXT if datatype == BYTES else FLAG
    if datatype.startswith("FP"):
        return {"type": "number"}
    bits = int(datatype.lstrip("UINT"))
    if bits == 64:  # not every generator has these bounds
        return {"type": "integer"}
    unsigned = datatype.startswith("U")
    return {
        "type": "integer",
        "minimum": 0 if unsigned else -(1 << bits - 1),
        "maximum": (1 << bits - (not unsigned)) - 1,
    }


def tensor(described: dict, sizes: dict, data: dict, parameters: dict[str, dict]) -> dict:
    """Return the schema of a tensor.

    Args:
        described: as in the metadata.
    """
    return record(
        {
            "name": {"type": "string", "const": described["name"]},
            "datatype": {"type": "string", "const": described["datatype"]},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, **sizes},
        },
        data={"type": "array", **data},
        parameters={"type": "object", "properties": parameters},
    )


def input_tensor(described: dict, samples: bool, most: int) -> dict:
    """Return the schema of an input.

    Args:
        samples: whether its elements are files, texts or JSON, one for each sample.
        most: samples of a request.
    """
    dimensions = len(described["shape"])
    sizes = {"minItems": dimensions, "maxItems": dimensions + samples}
    if samples:
        coded = {
            "type": "string",
            "enum": [BASE64, "str"],
            "description": "what the strings are; by default, as in JSON",
        }
        return tensor(described, sizes, {"items": element(BYTES), "maxItems": most}, SIZE | {"content_type": coded})
    nested = {"anyOf": [element(described["datatype"]), {"type": "array"}]}
    return tensor(described, sizes, {"items": nested, "description": "its elements, flat or nested"}, SIZE)


def output_tensor(described: dict) -> dict:
    dimensions = len(described["shape"])
    coded = {"content_type": {"type": "string", "const": BASE64}} if described["name"] == PICTURE else {}
    sizes = {"minItems": dimensions, "maxItems": dimensions}
    return tensor(described, sizes, {"items": element(described["datatype"])}, SIZE | coded)
