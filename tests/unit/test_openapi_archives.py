"""The OpenAPI documents in archives: with real examples, and true of what the models answer; the command."""

import json
import re
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
from handlers.core.declared import METADATA_NAME
from tests import programs
from tests.shipped import ON_REQUEST, SHIPPED
from tests.unit.inputs import white_box
from tests.unit.schemas import JSON, TOYS, check, copied, document_of, every_path

HOUSE = {"rooms": 3, "area": 70.5}
DECLARED = "from handlers.core.declared import Column"


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


def test_archive_has_the_sample_and_the_answer_in_the_open_inference_protocol(price: Path):
    document = openapi.read(price)
    names = ("inferRequest", "inferAnswer")
    request, answer = (document["components"]["examples"][f"price-{name}"]["value"] for name in names)
    check(document, "price-InferRequest", request)
    check(document, "price-InferAnswer", answer)
    with DryRun(price) as worker:
        assert worker.predict([{"body": request}], [{"bundle-protocol": "v2"}]) == [(200, answer)]
    about = document["paths"]["/v2/models/price"]["get"]["responses"]["200"]["content"][JSON]["example"]
    assert json.loads(mar.read(price, METADATA_NAME)) == {
        name: about[name] for name in ("platform", "inputs", "outputs")
    }


def test_answer_without_the_declared_columns_is_rejected(tmp_path: Path):
    column = 'columns = (Column("cost", "FP32", ("cost",)),)\n\n    class Answer'
    folder = copied(
        "price",
        tmp_path,
        **{"class Answer": column, "from handlers.core.batch": f"{DECLARED}\nfrom handlers.core.batch"},
    )
    with pytest.raises(BundleError, match=r"columns of PriceHandler .* its answer .*KeyError: 'cost'"):
        archive(folder, tmp_path / "store")


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
    document = json.loads(ended.stdout)
    validate(document)
    assert "*/*" in document["paths"]["/predictions/price"]["post"]["requestBody"]["content"]
    assert document["components"]["parameters"]["price-version"]["schema"]["enum"] == ["1.0"]
    assert "price: its handler does not declare what it accepts" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", [*SHIPPED, *ON_REQUEST])
def test_answers_of_a_shipped_model_to_its_sample_are_of_their_schemas(model: str, tmp_path: Path):
    [folder] = select([model])
    built = archive(folder, tmp_path)
    document = openapi.read(built.path)
    examples = document["components"]["examples"]
    validate(document)
    check(document, f"{model}-Answer", examples[f"{model}-answer"]["value"])
    check(document, f"{model}-InferAnswer", examples[f"{model}-inferAnswer"]["value"])
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
    # the document is that of inference
    of_management = {("409", "OneOfSeveralReplicas"), ("400", "InvalidParameter")}
    assert of_management <= found
    assert all(name in openapi.SERVER_ERRORS[int(status)] for status, name in found - of_management)


def test_every_error_of_the_proxy_for_a_post_is_in_the_response_of_its_status():
    found = re.findall(r"^ +(\d{3}) +([A-Z]\w+);$", (ROOT / "docker" / "nginx" / "nginx.conf").read_text(), re.M)
    assert ("429", "TooManyRequests") in found
    for status, name in found:
        if name != "MethodNotAllowed":  # of another method
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
    assert document["paths"].keys() == every_path("price", False) | every_path("boxes", False)
    assert document["servers"] == [{"url": "https://models.example"}]
