"""The document at /openapi.json of a real server: true of what the server answers, and good for generated clients."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import requests
from openapi_spec_validator import validate

from bundle import mar, openapi
from bundle.catalog import select
from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.unit.schemas import write_archive

MODELS = {model.name: model for model in select(SHIPPED)}
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
CHECKS += ["response_headers_conformance", "response_schema_conformance"]
JSON = "application/json"
COPY = "mnist-copy"


@pytest.fixture(scope="module")
def document(served: Place) -> dict:
    return get(served)


def get(served: Place) -> dict:
    answer = requests.get(f"{served.client.inference}/openapi.json", timeout=30)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, JSON)
    return answer.json()


def test_running_server_describes_its_models_as_their_archives_do(served: Place, document: dict):
    validate(document)
    archives, running = (served.bundle("openapi", *arguments) for arguments in (SHIPPED, ["--running"]))
    assert json.loads(archives.stdout) == json.loads(running.stdout), archives.stderr + running.stderr
    assert json.loads(running.stdout) == document | {"servers": [{"url": served.client.inference}]}


def test_registered_model_is_described_until_it_is_unregistered(served: Place, document: dict):
    management = f"{served.client.management}/models"
    file = served.store / write_archive(served.store, COPY, mar.read(served.store / "mnist.mar", openapi.NAME))
    registration = {"url": file.name, "model_name": COPY, "initial_workers": "0"}
    assert requests.post(management, params=registration, timeout=60).ok
    try:
        more = get(served)
        assert more["paths"].keys() - document["paths"].keys() == {
            path.replace("/mnist", f"/{COPY}") for path in document["paths"] if "/mnist" in path
        }
        validate(more)
    finally:
        assert requests.delete(f"{management}/{COPY}", timeout=60).ok
        file.unlink()
    assert get(served) == document


def test_management_api_still_has_its_own_description(served: Place):
    described = requests.options(f"{served.client.management}/", timeout=30).json()
    assert "/models" in described["paths"]


@pytest.mark.parametrize("name", SHIPPED)
def test_examples_of_the_document_are_answered(served: Place, document: dict, name: str):
    sent = 0
    for path, item in document["paths"].items():
        operation = item.get("post")
        if operation is None or operation["tags"] != [name] or "expla" in path:  # explanations can take seconds
            continue
        version = document["components"]["parameters"][f"{name}-version"]["schema"]["enum"][0]
        url = served.client.inference + path.replace("{version}", version)
        for media_type, content in operation["requestBody"]["content"].items():
            for body in examples(document, content):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                if media_type == JSON or isinstance(body, str):
                    answer = requests.post(url, data=data, headers={"Content-Type": media_type}, timeout=60)
                    assert answer.status_code == 200, (path, answer.text)
                    sent += 1
    assert sent >= 5


def examples(document: dict, content: dict) -> list:
    named = [each["$ref"].rpartition("/")[2] for each in content.get("examples", {}).values()]
    found = [document["components"]["examples"][name]["value"] for name in named]
    return found + ([content["example"]] if "example" in content else [])


def test_schemathesis_finds_no_answer_outside_of_the_schema(served: Place, tmp_path: Path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.client.inference}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--phases", "fuzzing", "--mode", "all", "--max-examples", "4"]
    # several workers of it crash in the compiler of Python 3.11
    command += ["--generation-deterministic", "--workers", "1", "--request-timeout", "60", "--no-shrink"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    generated = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert generated, ended.stdout
    assert generated[1] == generated[2]
    assert int(generated[1]) > 150


# --- a generated client -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(document: dict, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module of pydantic models that datamodel-code-generator makes of the document."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "datamodel_code_generator", "--input", "openapi.json", "--output", "client.py"]
    command += ["--input-file-type", "openapi", "--output-model-type", "pydantic_v2.BaseModel"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    spec = importlib.util.spec_from_file_location("client", folder / "client.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["client"] = module  # pydantic looks for annotations there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHIPPED)
def test_generated_models_send_the_sample_and_read_the_answer(
    served: Place, document: dict, generated: ModuleType, name: str
):
    sample = document["components"]["examples"][f"{name}-request"]["value"]
    request, answer = (getattr(generated, f"{name.capitalize()}{part}") for part in ("Request", "Answer"))
    sent = request(**sample).model_dump_json(exclude_none=True)
    answered = requests.post(
        f"{served.client.inference}/predictions/{name}", data=sent, headers={"Content-Type": JSON}, timeout=60
    )
    read = answer.model_validate_json(answered.text)
    if name == "mnist":
        assert read.top_3_classes[0] == int(MODELS[name].bundle.expect)
    else:
        assert read.top_k[0].label == MODELS[name].bundle.expect
