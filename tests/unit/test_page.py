"""The page's parts that need no browser: forms from schemas, requests, snippets, what is shown of answers."""

import ast
import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from bundle import openapi
from bundle.build.handler import load_handler
from bundle.build.model_api import ModelAPI
from bundle.catalog import ModelFolder, select
from bundle.cli.app import app
from bundle.errors import BundleError, NotRunning
from bundle.paths import ROOT
from bundle.server.ports import free_ports
from page import views
from page.call import KEY, Call, Reply
from page.names import KnownNames
from page.schema import Field, Model, models
from page.served import KeyRequired, Proxied, Recorded, Served
from tests import programs

TOYS = Path(__file__).parents[1] / "models"
EXPLAIN_OPTIONS = ["method", "target", "n_steps", "n_samples"]
FORMS = {
    "mnist": ({"data": "image"}, []),  # top_k has only one value
    "image": ({"data": "image"}, ["top_k"]),
    "audio": ({"data": "sound"}, ["top_k"]),
    "text": ({"data": "text"}, ["top_k"]),
    "cells": ({"data": "image"}, ["score_threshold", "max_detections"]),
    "membrane": ({"data": "image"}, []),
    "molecule": ({"data": "json"}, ["top_k"]),
    "avdigits": ({"image": "image", "text": "text", "audio": "sound"}, ["top_k"]),
    "boxes": ({"data": "image"}, ["score_threshold"]),
    "price": ({"data": "json"}, []),
}
ANSWERS = {"mnist": {"top_3_classes": [], "top_3_probabilities": []}, "cells": {"detections": []}}
PICTURES = {"cells": {"format": "png"}, "membrane": {"format": "png", "overlay": "true"}}


def document_of(name: str) -> dict:
    folder = ModelFolder(TOYS / name) if name in ("boxes", "price") else select([name])[0]
    return ModelAPI(folder, load_handler(folder)).document(answer=ANSWERS.get(name, {"top_k": []}))


def model_of(name: str) -> Model:
    [model] = models(document_of(name))
    return model


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_form_of_a_model_has_its_inputs_and_options(name: str):
    model = model_of(name)
    inputs, options = FORMS[name]
    assert model.name == name
    assert model.summary
    assert {field.name: field.kind for field in model.fields} == inputs
    assert [option.name for option in model.predict.options] == options
    assert model.predict.path == f"/predictions/{name}"
    assert model.predict.picture == PICTURES.get(name)
    if name in ("boxes", "price"):
        assert model.explain is None
    else:
        assert model.explain.path == f"/explanations/{name}"
        assert model.explain.picture == {"format": "png"}
        assert [option.name for option in model.explain.options] == EXPLAIN_OPTIONS


def test_models_of_a_merged_document_are_all_offered_and_other_routes_are_not():
    merged = openapi.merge([document_of("price"), document_of("text")])
    merged["paths"]["/predictions/text/2.0"] = merged["paths"]["/predictions/text"]
    merged["paths"]["/v2/models/text/infer"] = merged["paths"]["/predictions/text"]
    assert [model.name for model in models(merged)] == ["price", "text"]


def test_model_whose_handler_declares_nothing_takes_a_file():
    [model] = models(openapi.merge([openapi.generic("old", "1.0")]))
    assert (model.name, model.fields, model.explain) == ("old", (Field("data", "file"),), None)


def test_options_have_their_kinds_bounds_and_choices():
    model = model_of("cells")
    threshold, most = model.predict.options
    assert (threshold.kind, most.kind) == ("number", "integer")
    assert threshold.about == "The lowest score of a detection. From 0 to 1."
    assert most.about == "The most detections of the answer. From 1 to 100."
    target = next(option for option in model.explain.options if option.name == "target")
    assert (target.kind, target.choices) == ("choice", ("RBC", "WBC", "Platelets"))


def test_option_that_is_a_boolean_has_its_default():
    document = document_of("text")
    schema = {"type": "boolean", "default": True, "description": "Whether it counts."}
    document["paths"]["/predictions/text"]["post"]["parameters"].append(
        {"name": "counted", "in": "query", "schema": schema}
    )
    [model] = models(document)
    counted = model.predict.options[-1]
    assert (counted.kind, counted.default, counted.about) == ("boolean", True, "Whether it counts.")


@pytest.mark.parametrize("name", ["mnist", "image", "audio", "text", "molecule"])
def test_example_of_an_input_is_the_folders_sample(name: str, tmp_path: Path):
    [field] = model_of(name).fields
    sample = select([name])[0].sample_file
    if field.kind in ("image", "sound"):
        written = Path(views.written_file(field.example, tmp_path, "data"))
        assert written.suffix == sample.suffix
        assert written.read_bytes() == sample.read_bytes()
    elif field.kind == "text":
        assert field.example == sample.read_text()
    else:
        assert field.example == json.loads(sample.read_text())["data"]


def test_examples_of_several_inputs_are_their_files(tmp_path: Path):
    examples = {field.name: field.example for field in model_of("avdigits").fields}
    assert Path(views.written_file(examples["image"], tmp_path, "image")).suffix == ".png"
    assert Path(views.written_file(examples["audio"], tmp_path, "audio")).suffix == ".flac"


@pytest.mark.parametrize("value", [None, 3, "", "not base64!"])
def test_example_that_is_no_file_is_left_out(value: object, tmp_path: Path):
    assert views.written_file(value, tmp_path, "data") is None


def test_input_of_an_unknown_kind_is_a_file():
    document = document_of("mnist")
    document["paths"]["/predictions/mnist"]["post"]["requestBody"]["content"]["multipart/form-data"]["encoding"] = {}
    [model] = models(document)
    assert model.fields == (Field("data", "file", model.fields[0].example),)


# --- requests and snippets -----------------------------------------------------------------------------------------


def told(request: Request) -> Response:
    """Answer what was received."""
    files = {name: base64.b64encode(file.read()).decode() for name, file in request.files.items()}
    received = {"query": request.args.to_dict(), "files": files, "form": request.form.to_dict()}
    received |= {"json": request.get_json(silent=True), "key": request.headers.get("Authorization")}
    return Response(json.dumps(received), content_type="application/json")


CALLS = {
    "picture": Call("", {}, {"data": Path("a picture.png")}, {}),
    "name with marks": Call("", {}, {"data": Path('it\'s; a, "b" \\c&.png')}, {}),
    "options": Call("", {"top_k": "3", "target": "a & b"}, {"data": Path("x.png")}, {}),
    "several": Call("", {}, {"image": Path("i.png"), "audio": Path("s.wav")}, {"text": "it's @seven; <7>"}),
    "file and JSON": Call("", {}, {"image": Path("i.png")}, {"house": {"rooms": 3, "old": True, "name": None}}),
    "text": Call("", {"top_k": "1"}, {}, {"data": 'Wo ist mein Gepäck?\nIt\'s "here" $HOME `x`'}),
    "JSON": Call("", {}, {}, {"data": {"nodes": [1, 2], "edges": [[0, 1]], "none": None, "true": True}}),
    "nothing": Call("", {}, {}, {}),
    "key": Call("", {}, {}, {"data": "hello"}, keyed=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_curl_command_and_python_program_send_what_the_page_sends(
    name: str, httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    httpserver.expect_request("/predictions/x").respond_with_handler(told)
    files = {field: tmp_path / file for field, file in CALLS[name].files.items()}
    for index, file in enumerate(files.values()):
        file.write_bytes(bytes(range(index, 200)))
    call = CALLS[name].but(url=httpserver.url_for("/predictions/x"), files=files)
    monkeypatch.setenv(KEY, "secret")

    def signed(request):
        request.headers["Authorization"] = "Bearer secret"
        return request

    sent = call.send(signed if call.keyed else None)
    assert (sent.status, sent.json()["key"]) == (200, "Bearer secret" if call.keyed else None)
    program = call.python().replace("answer.json()", "answer.text")
    for command in (["bash", "-c", f"{call.curl()} -fsS"], [sys.executable, "-c", program]):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout) == sent.json()


def test_snippets_write_a_picture_into_a_file(httpserver: HTTPServer, tmp_path: Path):
    httpserver.expect_request("/explanations/x").respond_with_data(b"\x89PNG...")
    call = Call(httpserver.url_for("/explanations/x"), {"format": "png"}, {}, {"data": "hello"})
    assert call.send().is_picture
    for name, command in {
        "a.png": ["bash", "-c", call.curl("a.png")],
        "b.png": [sys.executable, "-c", call.python("b.png")],
    }.items():
        subprocess.run(command, check=True, cwd=tmp_path, timeout=60, capture_output=True)
        assert (tmp_path / name).read_bytes() == b"\x89PNG..."


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            Reply(400, b'{"code": 400, "type": "EmptyInput", "message": "It is empty."}', 0),
            "400 EmptyInput: It is empty.",
        ),
        (Reply(413, b"", 0), "413: The request is larger than the server accepts."),
        (Reply(502, b"<html>bad</html>", 0), "502: <html>bad</html>"),
        (Reply(500, b"", 0), "500: The answer has no text."),
    ],
)
def test_error_is_shown_with_what_the_server_says(reply: Reply, said: str):
    assert reply.error() == said


# --- views ---------------------------------------------------------------------------------------------------------


def test_bars_are_the_ranking_and_objects_of_one_class_are_numbered():
    detections = [{"label": "RBC", "class": 0, "score": score, "box": [0, 0, 1, 1]} for score in (0.9, 0.8)]
    assert views.bars({"detections": detections}) == {"RBC": 0.9, "RBC (2)": 0.8}
    assert views.bars({"top_3_classes": [3, 9], "top_3_probabilities": [0.9, 0.1]}) == {"3": 0.9, "9": 0.1}
    assert views.bars({"price": 3}) == {}


def test_message_is_escaped_and_read_aloud():
    assert views.message("<b>", failed=True) == '<p role="alert" class="failed">&lt;b&gt;</p>'
    assert 'role="status"' in views.message("done")


def test_json_with_long_strings_is_shortened():
    shown = json.loads(views.as_json({"mask": "A" * 1000, "classes": [{"label": "cell"}]}))
    assert shown["mask"] == "A" * 200 + "... (1000 characters)"
    assert shown["classes"] == [{"label": "cell"}]


# --- the server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(httpserver: HTTPServer, tmp_path: Path) -> Recorded:
    """A server, and the record of it."""
    record = {
        "inference": httpserver.url_for("").rstrip("/"),
        "management": "",
        "key_file": "",
    }
    (tmp_path / "server.json").write_text(json.dumps(record))
    return Recorded(tmp_path / "server.json")


@pytest.fixture
def proxied(httpserver: HTTPServer) -> Proxied:
    """A server behind the proxy of the Docker stack."""
    return Proxied(httpserver.url_for("").rstrip("/"))


@pytest.fixture(params=["recorded", "proxied"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


def test_models_are_those_of_the_servers_document(served: Served, httpserver: HTTPServer):
    httpserver.expect_request("/openapi.json").respond_with_json(document_of("text"))
    assert list(served.models()) == ["text"]


def test_server_that_does_not_describe_its_models_is_an_error(served: Served, httpserver: HTTPServer):
    said = {"code": 503, "type": "ServerUnavailable", "message": "The server is starting."}
    httpserver.expect_request("/openapi.json").respond_with_json(said, status=503)
    expected = "Nothing describes the models: /openapi.json answers 503 ServerUnavailable: The server is starting."
    with pytest.raises(BundleError, match=re.escape(expected)):
        served.models()


def test_stack_that_does_not_run_is_an_error_that_says_what_to_do():
    with pytest.raises(NotRunning, match=r"No server answers at http://.*\. Start it: make up PAGE=1"):
        Proxied(f"http://127.0.0.1:{free_ports(1)[0]}").models()


def test_server_that_does_not_run_is_an_error_that_says_what_to_do(recorded: Recorded):
    record = json.loads(recorded.record.read_text())
    recorded.record.write_text(json.dumps(record | {"inference": f"http://127.0.0.1:{free_ports(1)[0]}"}))
    with pytest.raises(NotRunning, match=r"No server answers at http://.*\. Start it: make serve"):
        recorded.models()
    recorded.record.unlink()
    with pytest.raises(NotRunning, match="TorchServe is not running. Start it: make serve"):
        recorded.models()


def test_key_of_a_server_that_requires_one_is_sent(recorded: Recorded, httpserver: HTTPServer, tmp_path: Path):
    keys = {"inference": {"key": "abc", "expiration time": "2999-01-01T00:00:00Z"}}
    (tmp_path / "key_file.json").write_text(json.dumps(keys))
    record = json.loads(recorded.record.read_text()) | {"key_file": str(tmp_path / "key_file.json")}
    recorded.record.write_text(json.dumps(record))
    httpserver.expect_request("/openapi.json", headers={"Authorization": "Bearer abc"}).respond_with_json(
        document_of("text")
    )
    assert list(recorded.models()) == ["text"]


REFUSED = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}


def test_key_that_a_person_has_typed_in_is_sent(served: Served, httpserver: HTTPServer):
    headers = {"Authorization": "Bearer typed"}
    httpserver.expect_request("/openapi.json", headers=headers).respond_with_json(document_of("text"))
    httpserver.expect_request("/openapi.json").respond_with_json(REFUSED, status=400)
    assert list(served.models("typed")) == ["text"]
    with pytest.raises(KeyRequired, match=re.escape("The server requires a key.")):
        served.models()
    for wrong in ("wrong", "schlüssel", "two\nlines"):
        with pytest.raises(KeyRequired, match=re.escape("The server does not accept this key.")):
            served.models(wrong)


def test_call_behind_the_proxy_is_repeated_at_the_address_of_the_browser_with_a_persons_own_file(proxied: Proxied):
    call = Call(f"{proxied.url}/predictions/x", {"top_k": "1"}, {"data": Path("/tmp/page/0a1b/digit.png")}, {}, True)
    repeated = proxied.repeatable(call, "https://models.example:8443")
    expected = "-F data=@digit.png 'https://models.example:8443/predictions/x?top_k=1'"
    assert repeated.curl() == f'curl -H "Authorization: Bearer ${KEY}" {expected}'
    assert (repeated.options, repeated.keyed) == (call.options, True)


def test_call_to_a_recorded_server_is_repeated_as_it_was_sent(recorded: Recorded):
    call = Call("http://127.0.0.1:8080/predictions/x", {}, {"data": Path("/tmp/digit.png")}, {})
    assert recorded.repeatable(call, "http://127.0.0.1:7860") == call


# --- names and the image -------------------------------------------------------------------------------------------


def status_under(host: str | None, scheme: str = "http", names: Iterable[str] = ("Models.example",)) -> int:
    """Return the status of an application that knows names, asked under one of them or another one."""
    sent = []

    async def page(scope: dict, receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": "http", "scheme": scheme, "headers": headers}
    asyncio.run(KnownNames(page, names)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "LOCALHOST", "models.example:80", "127.0.0.1", "10.0.0.5:8080", "[::1]:8080"],
)
def test_addresses_and_known_names_are_answered(host: str):
    assert [status_under(host, scheme) for scheme in ("http", "https")] == [200, 200]


@pytest.mark.parametrize(
    "host",
    [
        *("elsewhere.example", "localhost.elsewhere.example", "127.0.0.1.elsewhere.example:8080", "[::1", "::1"),
        *("127.0.0.1@elsewhere.example", "", None),
    ],
)
def test_name_that_another_site_may_own_is_rejected_unless_a_certificate_proves_it(host: str | None):
    assert status_under(host, names=[]) == 400
    assert status_under(host, "https", names=[]) == 200
    assert [status_under(host, scheme) for scheme in ("http", "https")] == [400, 400]  # a page can forge the scheme


def imported_modules(file: Path) -> set[Path]:
    """Return the files of the bundle that a module imports, with those that they import, and their packages."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bundle"):
            module = ROOT / f"{node.module.replace('.', '/')}.py"
            packages = {folder / "__init__.py" for folder in module.parents if (folder / "__init__.py").exists()}
            found |= {module, *packages} | imported_modules(module)
    return found


def test_image_has_the_modules_of_the_bundle_that_the_page_imports_and_no_others():
    stage = (ROOT / "docker" / "Dockerfile").read_text().partition(" AS page\n")[2]
    copied = {name for name in re.findall(r"/sources/(\S+)", stage) if name.startswith("bundle/")}
    imported = set().union(*map(imported_modules, (ROOT / "page").glob("*.py")))
    assert copied == {str(file.relative_to(ROOT)) for file in imported}


def test_command_without_a_server_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    ended = programs.run(app, "page")
    assert ended.status == NotRunning.status
    assert "TorchServe is not running. Start it: make serve" in ended.stderr
