"""The OpenAPI documents of models: valid, complete, and true of what the handlers accept and answer."""

import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from openapi_spec_validator import validate

from bundle import openapi
from bundle.build import frontend
from bundle.build.handler import load_handler
from bundle.build.model_api import ModelAPI
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from handlers.core.declared import metadata
from handlers.core.errors import RequestError
from handlers.core.open_inference import OpenInferenceReader
from handlers.core.request import RequestReader
from tests.shipped import ON_REQUEST, SHIPPED
from tests.unit.schemas import JSON, MULTIPART, URLENCODED, check, copied, document_of, every_path, folder_of

IMAGE, SOUND = {"image/*", "application/octet-stream"}, {"audio/*", "application/octet-stream"}
RAW = {
    "mnist": IMAGE,
    "image": IMAGE,
    "audio": SOUND,
    "text": {"text/plain"},
    "cells": IMAGE,
    "membrane": IMAGE,
    "molecule": set(),
    "avdigits": set(),
    "boxes": IMAGE,
    "price": set(),
}
OPTIONS = {
    **dict.fromkeys(["mnist", "image", "audio", "text", "molecule", "avdigits"], {"top_k"}),
    "cells": {"format", "score_threshold", "max_detections"},
    "membrane": {"format", "overlay"},
    "boxes": {"score_threshold"},
    "price": set(),
}
EXPLAIN_OPTIONS = {"format", "method", "target", "n_steps", "n_samples"}


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", RAW)
def test_document_of_a_model_has_its_routes_bodies_and_options(model: str):
    document = document_of(model)
    validate(document)
    explained = model not in ("boxes", "price")
    routes = {f"/predictions/{model}": OPTIONS[model]}
    routes |= {f"/explanations/{model}": EXPLAIN_OPTIONS} if explained else {}
    assert document["paths"].keys() == every_path(model, explained)
    for route, options in routes.items():
        operation = document["paths"][route]["post"]
        assert {parameter["name"] for parameter in operation["parameters"]} == options
        bodies = operation["requestBody"]["content"]
        assert bodies.keys() == RAW[model] | {JSON, MULTIPART, URLENCODED}
        inputs = {"image", "text", "audio"} if model == "avdigits" else {"data"}
        assert bodies[MULTIPART]["schema"]["properties"].keys() == inputs | options
        assert ("image/png" in operation["responses"]["200"]["content"]) == ("format" in options)
        assert operation["responses"].keys() == {"200", *map(str, openapi.error_types())}


def test_shipped_models_are_all_described_here():
    assert set(RAW) == {*SHIPPED, *ON_REQUEST, "boxes", "price"}


def test_merged_document_of_all_models_is_valid_and_has_all_of_each():
    documents = [document_of(model) for model in RAW]
    merged = openapi.merge(documents, "https://models.example")
    validate(merged)
    assert merged["servers"] == [{"url": "https://models.example"}]
    assert merged["security"] == [{}, {"key": []}]
    for document in documents:
        assert document["paths"].items() <= merged["paths"].items()
        for kind, components in document["components"].items():
            assert components.items() <= merged["components"][kind].items()


def test_merged_components_of_two_models_with_types_of_one_name_stay_apart(tmp_path: Path):
    folder = copied("price", tmp_path, price="cost", rooms="floors")
    (tmp_path / "price").rename(tmp_path / "cost")
    other = ModelFolder(tmp_path / "cost")
    assert folder.name != other.name
    cost = ModelAPI(other, load_handler(other)).document()
    schemas = openapi.merge([document_of("price"), cost])["components"]["schemas"]
    assert "rooms" in schemas["price-House"]["properties"]
    assert "floors" in schemas["cost-House"]["properties"]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("Answer = object()", "a type that PriceHandler declares has no JSON schema: Unable to generate"),
        ("Answer = Tensor", "a type that PriceHandler declares has no JSON schema: Unable to generate"),
    ],
)
def test_answer_type_without_a_schema_is_rejected(declared: str, message: str, tmp_path: Path):
    changes = {"class Answer(TypedDict):\n        price: float": declared}
    folder = copied("price", tmp_path, **changes)
    with pytest.raises(BundleError, match=f"handler.py: {message}"):
        ModelAPI(folder, load_handler(folder))


def test_answer_type_with_annotations_that_are_strings_is_described(tmp_path: Path):
    changes = {"import torch\n": "from __future__ import annotations\n\nimport torch\n", "price: float": "price: Price"}
    changes |= {"class PriceHandler": "Price = float\n\n\nclass PriceHandler"}
    folder = copied("price", tmp_path, **changes)
    before = set(sys.modules)
    document = ModelAPI(folder, load_handler(folder)).document()
    assert document["components"]["schemas"]["price-Answer"]["properties"] == {"price": {"type": "number"}}
    assert not [name for name in set(sys.modules) - before if "price" in name]


# --- requests ------------------------------------------------------------------------------------------------------

HOUSE = {"rooms": 3, "area": 70.5}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("price", {"data": HOUSE}),
        ("price", {"instances": [HOUSE, {"data": HOUSE}]}),
        ("price", {"data": HOUSE, "top_k": 1}),
        ("price", {"data": {"rooms": 0, "area": 1}}),
        ("price", {"data": {"rooms": 1}}),
        ("price", {"instances": []}),
        ("price", {"instances": [HOUSE] * 33}),
        ("price", {"data": HOUSE, "instances": [HOUSE]}),
        ("price", {}),
        ("boxes", {"data": "iVBORw0KGgo=", "score_threshold": 0.3}),
        ("boxes", {"data": "iVBORw0KGgo=", "score_threshold": 2}),
        ("boxes", {"data": "iVBORw0KGgo=", "score_threshold": None}),
        ("boxes", {"data": "iVBORw0KGgo=", "score_threshold": True}),
        ("boxes", {"data": ""}),
        ("boxes", {"data": 3}),
        ("boxes", {"instances": ["iVBORw0KGgo=", {"data": "iVBORw0KGgo="}]}),
        ("boxes", {"data": {"b64": "iVBORw0KGgo="}}),
        ("boxes", {"data": {"b64": ""}}),
        ("boxes", {"data": {"b64": 3}}),
        ("boxes", {"data": {"b64": "iVBORw0KGgo=", "name": "a.png"}}),
        ("boxes", {"instances": [{"b64": "iVBORw0KGgo="}, {"data": {"b64": "iVBORw0KGgo="}}]}),
        ("text", {"data": "hello", "top_k": 2}),
        ("text", {"data": "hello", "top_k": 0}),
        ("text", {"data": "hello", "top_k": None}),
        ("text", {"data": "hello", "top_k": 1.5}),
        ("text", {"instances": ["hello", {"text": "hello"}]}),
        ("text", {"instances": ["hello", {"b64": "aGVsbG8="}]}),
        ("membrane", {"data": "iVBORw0KGgo=", "format": "png", "overlay": True}),
        ("membrane", {"data": "iVBORw0KGgo=", "format": "jpg"}),
        ("molecule", {"data": {"b64": "aGVsbG8="}}),
        ("molecule", {"data": {"nodes": [1, 2], "edges": [[0, 1]]}}),
        ("molecule", {"data": {"nodes": [1, 2], "edges": [[0, 1, 1]]}}),
        ("molecule", {"data": {"nodes": [1.5]}}),
        ("molecule", {"instances": [{"nodes": [1]}, {"data": {"nodes": [1], "edge_attr": None}}]}),
        ("avdigits", {"text": "seven", "top_k": 3}),
        ("avdigits", {"top_k": 3}),
        ("avdigits", {"instances": [{"text": "seven"}, {"image": "iVBORw0KGgo=", "text": "7"}]}),
        ("avdigits", {"instances": [{"image": {"b64": "iVBORw0KGgo="}, "text": "7"}]}),
        ("avdigits", {"instances": [{"b64": "iVBORw0KGgo="}]}),
        ("avdigits", {"instances": [{"sound": "seven"}]}),
        ("avdigits", {"instances": ["seven"]}),
    ],
)
def test_schema_accepts_what_the_handler_reads_and_nothing_else(model: str, body: dict):
    handler = load_handler(folder_of(model))
    reader = RequestReader(handler.Inputs, handler.Options, handler.settings.max_instances)
    document = document_of(model)
    allowed = document["paths"][f"/predictions/{model}"]["post"]["requestBody"]["content"][JSON]["schema"]
    fits = jsonschema.Draft202012Validator({**allowed, "components": document["components"]}).is_valid(body)
    assert fits == reads(reader, body)


@pytest.mark.parametrize("model", ["mnist", "text", "avdigits", "price"])
def test_form_has_no_objects_of_base64(model: str):
    """A form field with the JSON {"b64": "..."} would be read as the file or the text itself."""
    document = document_of(model)
    bodies = document["paths"][f"/predictions/{model}"]["post"]["requestBody"]["content"]
    assert ("Bytes" in json.dumps(bodies[JSON]) + json.dumps(document["components"])) == (model != "price")
    for form in (MULTIPART, URLENCODED):
        assert "Bytes" not in json.dumps(bodies[form])


def reads(reader: RequestReader, body: dict) -> bool:
    try:
        return bool(reader.read({"body": body}, {"Content-Type": JSON}))
    except RequestError:
        return False


@pytest.mark.parametrize(
    ("model", "verb", "option", "accepted", "refused"),
    [
        ("mnist", "Request", "top_k", [3], [1, 11]),
        ("image", "Request", "top_k", [1, 10], [0, 11]),
        ("cells", "Request", "max_detections", [1, 100], [101]),
        ("cells", "ExplainRequest", "target", ["RBC", 0, 2], [3, -1, "car"]),
    ],
)
def test_options_are_limited_by_settings_and_labels(model: str, verb: str, option: str, accepted: list, refused: list):
    document = document_of(model)
    for value in accepted:
        check(document, f"{model}-{verb}", {"data": "iVBORw0KGgo=", option: value})
    for value in refused:
        with pytest.raises(jsonschema.ValidationError):
            check(document, f"{model}-{verb}", {"data": "iVBORw0KGgo=", option: value})


def tensor(name: str = "data", datatype: str = "BYTES", shape: tuple = (1,), data: object = ("iVBORw0KGgo=",)) -> dict:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": list(data)}


PIXELS = ("pixels", "UINT8", (1, 1, 28, 28))


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("mnist", {"inputs": [tensor()]}),
        ("mnist", {"inputs": [tensor(shape=(2, 1), data=["iVBORw0KGgo="] * 2)], "id": "7"}),
        ("mnist", {"inputs": [tensor(*PIXELS, [0] * 784)]}),
        ("mnist", {"inputs": [tensor(*PIXELS, [[[[0] * 28] * 28]])]}),
        ("mnist", {"inputs": [tensor(*PIXELS, [256] * 784)]}),
        ("mnist", {"inputs": [tensor(*PIXELS, [0.5] * 784)]}),
        ("mnist", {"inputs": [tensor("digits")]}),
        ("mnist", {"inputs": [tensor(datatype="FP32", data=[1])]}),
        ("mnist", {"inputs": [tensor(shape=(33,), data=["iVBORw0KGgo="] * 33)]}),
        ("mnist", {"inputs": []}),
        ("mnist", {}),
        ("mnist", {"inputs": [tensor()], "parameters": {"top_k": 3, "timeout": 5}}),
        ("mnist", {"inputs": [tensor()], "parameters": {"topk": 3}}),
        ("mnist", {"inputs": [tensor()], "outputs": [{"name": "json"}, {"name": "top_3_classes"}]}),
        ("mnist", {"inputs": [tensor()], "outputs": [{"name": "label"}]}),
        ("mnist", {"inputs": [tensor() | {"parameters": {"content_type": "base64"}}]}),
        ("mnist", {"inputs": [tensor() | {"parameters": {"content_type": "hex"}}]}),
        ("text", {"inputs": [tensor(data=["hello"])], "outputs": [{"name": "label", "parameters": {}}]}),
        ("text", {"inputs": [tensor(data=[3])]}),
        ("cells", {"inputs": [tensor()], "parameters": {"format": "png"}, "outputs": [{"name": "picture"}]}),
        ("avdigits", {"inputs": [tensor("text", data=["seven"]), tensor("image")]}),
        ("avdigits", {"inputs": [tensor("sound")]}),
        ("molecule", {"inputs": [tensor(data=['{"nodes": [1]}'])]}),
    ],
)
def test_schema_of_the_open_inference_protocol_accepts_what_the_handler_reads(model: str, body: dict):
    handler = load_handler(folder_of(model))
    handler.context = SimpleNamespace(model_name=model, manifest={"model": {"modelVersion": "1.0"}})
    reader = OpenInferenceReader(handler, handler.Options, explains=False)
    document = document_of(model)
    assert fits(document, f"{model}-InferRequest", body) == reads(reader, body)


def fits(document: dict, component: str, value: object) -> bool:
    try:
        check(document, component, value)
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize("model", RAW)
def test_tensors_in_the_schema_are_those_of_the_metadata(model: str):
    handler, document = load_handler(folder_of(model)), document_of(model)
    declared = metadata(handler)
    about = document["paths"][f"/v2/models/{model}"]["get"]["responses"]["200"]["content"][JSON]
    assert about["example"] == {"name": model, "versions": [folder_of(model).bundle.version], **declared}
    check(document, "OpenInferenceModel", about["example"])
    request, answer = (document["components"]["schemas"][f"{model}-Infer{part}"] for part in ("Request", "Answer"))
    for part, tensors in (("inputs", request), ("outputs", answer)):
        items = tensors["properties"][part]["items"]
        named = {each["properties"]["name"]["const"] for each in items.get("anyOf", [items])}
        assert named - {"picture"} == {each["name"] for each in declared[part]}


def test_jar_of_the_frontend_has_the_common_part():
    with zipfile.ZipFile(frontend.JAR) as jar:
        own = json.loads(jar.read(frontend.SCHEMA))
    assert own["server"] == openapi.common(), "run `make frontend`"
    assert own["model"] == openapi.generic("MODEL", "1.0"), "run `make frontend`"
    validate(openapi.merge([own["model"]]))
