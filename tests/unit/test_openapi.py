"""The OpenAPI documents of models: valid, complete, and true of what the handlers accept and answer."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
from openapi_spec_validator import validate
from pydantic import TypeAdapter

from bundle import mar, openapi
from bundle.build.archive import archive, fingerprint
from bundle.build.dryrun import DryRun
from bundle.build.handler import load_handler
from bundle.build.model_api import ModelAPI
from bundle.catalog import ModelFolder, select
from bundle.cli.app import app
from bundle.errors import BundleError
from bundle.paths import FRONTEND, ROOT
from handlers.core import answers, errors
from handlers.core import boxes as boxes_of_images
from handlers.core.errors import RequestError
from handlers.core.request import RequestReader
from tests import programs
from tests.shipped import ON_REQUEST, SHIPPED
from tests.unit.inputs import white_box

TOYS = Path(__file__).parents[1] / "models"
JSON, MULTIPART, URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
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


def folder_of(model: str) -> ModelFolder:
    return ModelFolder(TOYS / model) if model in ("boxes", "price") else select([model])[0]


def document_of(model: str) -> dict:
    folder = folder_of(model)
    return ModelAPI(folder, load_handler(folder)).document()


def check(document: dict, component: str, value: object) -> None:
    """Check a value against a component's schema.

    Raises:
        jsonschema.ValidationError: it does not fit.
    """
    schema = {"$ref": f"#/components/schemas/{component}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def copied(model: str, target: Path, **changes: str) -> ModelFolder:
    """Copy a toy model, and replace text in its handler.py."""
    shutil.copytree(TOYS / model, target / model)
    file = target / model / "handler.py"
    text = file.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return ModelFolder(target / model)


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", RAW)
def test_document_of_a_model_has_its_routes_bodies_and_options(model: str):
    document = document_of(model)
    validate(document)
    explained = model not in ("boxes", "price")
    routes = {f"/predictions/{model}": OPTIONS[model]}
    routes |= {f"/explanations/{model}": EXPLAIN_OPTIONS} if explained else {}
    assert document["paths"].keys() == routes.keys() | {"/ping"}
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
        ("text", {"data": "hello", "top_k": 2}),
        ("text", {"data": "hello", "top_k": 0}),
        ("text", {"data": "hello", "top_k": None}),
        ("text", {"data": "hello", "top_k": 1.5}),
        ("text", {"instances": ["hello", {"text": "hello"}]}),
        ("membrane", {"data": "iVBORw0KGgo=", "format": "png", "overlay": True}),
        ("membrane", {"data": "iVBORw0KGgo=", "format": "jpg"}),
        ("molecule", {"data": {"nodes": [1, 2], "edges": [[0, 1]]}}),
        ("molecule", {"data": {"nodes": [1, 2], "edges": [[0, 1, 1]]}}),
        ("molecule", {"data": {"nodes": [1.5]}}),
        ("molecule", {"instances": [{"nodes": [1]}, {"data": {"nodes": [1], "edge_attr": None}}]}),
        ("avdigits", {"text": "seven", "top_k": 3}),
        ("avdigits", {"top_k": 3}),
        ("avdigits", {"instances": [{"text": "seven"}, {"image": "iVBORw0KGgo=", "text": "7"}]}),
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


# --- answers and errors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def price(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(ModelFolder(TOYS / "price"), tmp_path_factory.mktemp("store")).path


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return archive(ModelFolder(TOYS / "boxes"), tmp_path_factory.mktemp("store")).path


def test_archive_has_the_document_with_its_sample_and_the_real_answer(price: Path):
    document = openapi.read(price)
    validate(document)
    request, answer = (document["components"]["examples"][f"price-{name}"]["value"] for name in ("request", "answer"))
    assert request == json.loads((TOYS / "price" / "sample.json").read_text())
    check(document, "price-Request", request)
    check(document, "price-Answer", answer)
    with DryRun(price) as worker:
        assert worker.predict([{"body": request}]) == [(200, answer)]
        [(status, several)] = worker.predict([{"body": {"instances": [HOUSE, HOUSE]}}])
    assert status == 200
    check(document, "price-Answers", several)


def test_answers_of_a_handler_that_declares_no_type_are_any_json(boxes: Path):
    document = openapi.read(boxes)
    with DryRun(boxes) as worker:
        [(status, answer)] = worker.predict([{"body": white_box(64, 64, (2, 4, 6, 12))}])
    assert status == 200
    check(document, "boxes-Answer", answer)
    assert document["components"]["examples"] == {}  # it has no sample


def test_detections_with_masks_and_keypoints_are_of_their_type():
    row = {
        "boxes": torch.tensor([[1.0, 2.0, 5.0, 6.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([0]),
        "masks": torch.ones(1, 8, 8, dtype=torch.uint8),
        "keypoints": torch.tensor([[[2.0, 3.0, 1.0], [4.0, 5.0, 1.0]]]),
        "keypoints_scores": torch.tensor([[0.5, 0.25]]),
    }
    found = boxes_of_images.describe(row, boxes_of_images.Placement((8, 8), (1.0, 1.0)), ["cell"])
    assert {"mask", "keypoints"} <= found[0].keys()
    assert TypeAdapter(list[answers.Detection]).validate_python(found, strict=True) == found
    check(document_of("cells"), "cells-Answer", {"detections": found})


def test_error_of_a_request_is_of_its_response(price: Path):
    document = openapi.read(price)
    with DryRun(price) as worker:
        answers = worker.predict([{"body": {"data": "a house"}}, {"body": {"instances": [HOUSE] * 33}}])
    assert [status for status, _ in answers] == [400, 413]
    for status, body in answers:
        response = document["components"]["responses"][f"Error{status}"]["content"][JSON]["schema"]
        schema = {**response, "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)
        assert not jsonschema.Draft202012Validator(schema).is_valid(body | {"type": "AnotherError"})


def test_text_model_has_its_sample_as_the_raw_body():
    [folder] = select(["text"])
    document = ModelAPI(folder, load_handler(folder)).document(answer={"top_k": []})
    body = document["paths"]["/predictions/text"]["post"]["requestBody"]["content"]["text/plain"]
    assert body["example"] == folder.sample_file.read_text()


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ("price: str", "price: Input should be a valid string"),
        ("cost: float", "cost: Field required"),
    ],
)
def test_archive_whose_answer_is_not_of_the_declared_type_is_rejected(declared: str, problem: str, tmp_path: Path):
    folder = copied("price", tmp_path, **{"price: float": declared})
    with pytest.raises(
        BundleError, match=rf"the answer to sample\.json is not of the type PriceHandler\.Answer: {problem}"
    ):
        archive(folder, tmp_path / "store")


def test_archive_whose_answer_has_more_fields_than_declared_is_rejected(tmp_path: Path):
    folder = copied("price", tmp_path, **{'{"price": row.item()}': '{"price": row.item(), "currency": "EUR"}'})
    with pytest.raises(BundleError, match="it has fields that are not declared"):
        archive(folder, tmp_path / "store")


def test_archive_of_a_model_that_does_not_answer_its_sample_has_no_examples_and_says_why(tmp_path: Path):
    folder = copied("price", tmp_path, **{"house = inputs.data": "house = inputs.dada"})
    built = archive(folder, tmp_path / "store")
    assert built.notes == ["openapi.json has no example of an answer. The answer to sample.json is 500."]
    document = openapi.read(built.path)
    validate(document)
    assert document["components"]["examples"] == {}


def test_archive_with_a_file_of_the_documents_name_is_rejected(tmp_path: Path):
    folder = copied("price", tmp_path)
    (folder.path / "openapi.json").write_text("{}")
    config = folder.path / "model-config.yaml"
    config.write_text(config.read_text() + "  files: [openapi.json]\n")
    with pytest.raises(BundleError, match=r"has openapi\.json, which each archive has\. Rename it\."):
        archive(ModelFolder(folder.path), tmp_path / "store")


def test_fingerprint_with_a_changed_sample_changes(tmp_path: Path):
    folder = copied("price", tmp_path)
    before = fingerprint(folder)
    (folder.path / "sample.json").write_text('{"data": {"rooms": 4, "area": 80}}')
    assert fingerprint(folder) != before


def test_archive_of_a_handler_that_is_no_batch_handler_has_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = copied("price", tmp_path)
    (folder.path / "handler.py").write_text(
        "from ts.torch_handler.base_handler import BaseHandler\n\n\nclass PlainHandler(BaseHandler):\n    pass\n"
    )
    config = folder.path / "model-config.yaml"
    config.write_text(config.read_text().replace("handler:\n  threads: 1\n", ""))
    built = archive(ModelFolder(folder.path), tmp_path / "store").path
    assert openapi.NAME not in mar.names(built)
    assert openapi.read(built) is None
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("BUNDLE_MODELS", str(tmp_path))
    ended = programs.run(app, "openapi")
    assert ended.status == 0, ended.stderr
    assert json.loads(ended.stdout)["paths"].keys() == {"/ping"}
    assert "price is left out: its handler does not declare what it accepts" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", [*SHIPPED, *ON_REQUEST])
def test_answers_of_a_shipped_model_to_its_sample_are_of_their_schemas(model: str, tmp_path: Path):
    [folder] = select([model])
    built = archive(folder, tmp_path)
    document = openapi.read(built.path)
    examples = document["components"]["examples"]
    check(document, f"{model}-Answer", examples[f"{model}-answer"]["value"])
    if model != "membrane":  # its picture is too large for a document
        check(document, f"{model}-Request", examples[f"{model}-request"]["value"])
    content = folder.sample_file.read_bytes()
    body = json.loads(content) if folder.sample_file.suffix == ".json" else {"data": content}
    with DryRun(built.path, batch_size=1, settings={"precision": "float32", "max_explain_seconds": 300.0}) as worker:
        [(status, explained)] = worker.predict([{**body, "n_steps": b"2"}], [{"explain": "True"}])
    assert status == 200, explained
    check(document, f"{model}-ExplainAnswer", explained)
    declared = document["components"]["schemas"][f"{model}-ExplainAnswer"]["properties"]
    assert explained.keys() <= declared.keys()


def test_every_error_of_the_handlers_is_in_the_response_of_its_status():
    types = openapi.error_types()
    listed = {name for names in types.values() for name in names}
    documented = set(re.findall(r"[├└]── (\w+)", errors.__doc__))
    assert documented <= listed | {"ServingError"}
    for name in documented:
        assert name in types[getattr(errors, name).code]


def test_every_error_of_the_frontends_patches_is_in_the_response_of_its_status():
    sources = "".join(file.read_text() for file in FRONTEND.rglob("*.java"))
    found = set(re.findall(r'\b([45]\d\d), (?:[A-Z_]+, )?"([A-Z]\w+)"', sources))
    assert {("429", "QueueFull"), ("503", "NoWorkers"), ("504", "WorkerTimeout"), ("400", "InvalidForm")} <= found
    assert all(name in openapi.SERVER_ERRORS[int(status)] for status, name in found)


def test_every_error_of_the_proxy_for_a_post_is_in_the_response_of_its_status():
    found = re.findall(r"^ +(\d{3}) +([A-Z]\w+);$", (ROOT / "docker" / "nginx" / "nginx.conf").read_text(), re.M)
    assert ("429", "TooManyRequests") in found
    for status, name in found:
        if name != "MethodNotAllowed":  # of GET
            assert name in openapi.SERVER_ERRORS[int(status)]


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_prints_the_document_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("BUNDLE_MODELS", str(TOYS))
    ended = programs.run(app, "openapi", "price", "boxes", "--url", "https://models.example")
    assert ended.status == 0, ended.stderr
    document = json.loads(ended.stdout)
    validate(document)
    assert document["paths"].keys() == {"/ping", "/predictions/price", "/predictions/boxes"}
    assert document["servers"] == [{"url": "https://models.example"}]
