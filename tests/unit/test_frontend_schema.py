"""The document at /openapi.json: the agent makes it of those in the archives, in TorchServe's own HTTP handlers."""

import json
import re

import pytest
from openapi_spec_validator import validate

from bundle import openapi
from tests.unit.schemas import document_of, write_archive
from tests.unit.test_frontend import NO_COMPILER
from tests.unit.test_frontend_routes import ask

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no JDK")]
MODELS = ("price", "mnist", "molecule")
COPIES = {"price-2.copy": "price", "predictions": "price", "copy": "mnist"}
FOREIGN = [  # files of this name in archives that the bundle did not build
    None,
    b"",
    b"no JSON",
    b"[]",
    b'{"openapi": "3.0.0", "paths": {"/pets": {}}}',
    b'{"openapi": "3.1.0", "paths": {"/predictions/x": {}}, "components": {}}',
    b'{"openapi": "3.1.0", "paths": {"/predictions/x": {}}, "components": {"parameters": []}}',
    b'{"openapi": "3.1.0", "paths": [], "components": {}}',
]


def second_version() -> dict:
    return json.loads(json.dumps(document_of("price")).replace('"rooms"', '"floors"'))


def hostile() -> dict:
    document = json.loads(json.dumps(document_of("price")).replace("price", "hostile"))
    document["paths"]["/ping"]["get"]["summary"] = "hostile"
    document["components"]["schemas"]["Error"] = {}
    return document


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Return what one server answered, after each of several changes."""
    store = tmp_path_factory.mktemp("store")
    archives = {model: write_archive(store, model, document_of(model)) for model in MODELS}
    others = [
        f"{write_archive(store, f'foreign{index}', content)} foreign{index}" for index, content in enumerate(FOREIGN)
    ]
    others += [f"{archives[model]} {name}" for name, model in COPIES.items()]
    others += [f"{archives['price']} a$1", f"{write_archive(store, 'hostile', hostile())} hostile"]
    steps = {
        "none": [],
        "some": [f"register {archive} {model}" for model, archive in archives.items()],
        "two versions": [f"register {write_archive(store, 'price', second_version(), '1.1')} price"],
        "other default": ["default price 1.1"],
        "all": [f"register {each}" for each in others],
    }
    answers = ask(store, *(line for lines in steps.values() for line in [*lines, "GET /openapi.json"]))
    assert [status for _, status, *_ in answers] == ["200"] * len(steps)
    return {step: json.loads(body) for step, (_, _, body, *_) in zip(steps, answers, strict=True)}


def test_document_of_several_models_is_that_of_their_merged_archives(documents: dict[str, dict]):
    assert documents["none"] == openapi.common()
    expected = json.dumps(openapi.merge(map(document_of, MODELS)))
    assert documents["some"] == json.loads(re.sub(r"\s+", " ", expected))  # as `ask` prints it


def test_document_of_all_models_is_valid(documents: dict[str, dict]):
    validate(documents["none"])
    validate(documents["all"])


def test_document_follows_the_versions_and_the_default_version(documents: dict[str, dict]):
    components = [documents[step]["components"] for step in ("some", "two versions", "other default")]
    versions = [each["parameters"]["price-version"]["schema"]["enum"] for each in components]
    assert versions == [["1.0"], ["1.0", "1.1"], ["1.0", "1.1"]]
    houses = [each["schemas"]["price-House"]["properties"] for each in components]
    assert ["rooms" in each for each in houses] == [True, True, False]


@pytest.mark.parametrize(("name", "model"), COPIES.items())
def test_model_under_another_name_is_described_under_that_name(documents: dict[str, dict], name: str, model: str):
    described, archived = documents["all"], document_of(model)
    for path, item in archived["paths"].items():
        assert described["paths"][path.replace(f"/{model}", f"/{name}")] == renamed(item, model, name)
    for kind, named in archived["components"].items():
        for key, component in named.items():
            other = f"{name}-{key.removeprefix(f'{model}-')}" if key.startswith(f"{model}-") else key
            assert described["components"][kind][other] == renamed(component, model, name)


def renamed(part: object, model: str, name: str) -> object:
    text = json.dumps(part)
    for before, after in ((f"/{model}-", f"/{name}-"), (f"_{model}", f"_{name}")):
        text = text.replace(before, after)
    text = text.replace(f'"tags": ["{model}"]', f'"tags": ["{name}"]')
    return json.loads(text.replace(f" {model}.", f" {name}."))


@pytest.mark.parametrize("index", range(len(FOREIGN)))
def test_model_that_the_bundle_did_not_build_has_a_generic_description(documents: dict[str, dict], index: int):
    generic = openapi.generic(f"foreign{index}", "1.0")
    assert generic["paths"].items() <= documents["all"]["paths"].items()
    assert generic["components"]["parameters"].items() <= documents["all"]["components"]["parameters"].items()


def test_model_whose_name_no_component_can_have_is_left_out(documents: dict[str, dict]):
    assert "$1" not in json.dumps(documents["all"])


def test_archive_does_not_change_what_is_common(documents: dict[str, dict]):
    assert "/predictions/hostile" in documents["all"]["paths"]
    assert documents["all"]["paths"]["/ping"] == openapi.common()["paths"]["/ping"]
    assert documents["all"]["components"]["schemas"]["Error"] == openapi.common()["components"]["schemas"]["Error"]
