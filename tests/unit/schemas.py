"""What the tests of OpenAPI documents share: documents of models, and checks against their schemas."""

import json
import shutil
import zipfile
from pathlib import Path

import jsonschema

from bundle import mar, openapi
from bundle.build.handler import load_handler
from bundle.build.model_api import ModelAPI
from bundle.catalog import ModelFolder, select
from handlers.core.declared import METADATA_NAME

TOYS = Path(__file__).parents[1] / "models"
JSON, MULTIPART, URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"


def folder_of(model: str) -> ModelFolder:
    return ModelFolder(TOYS / model) if model in ("boxes", "price") else select([model])[0]


def document_of(model: str) -> dict:
    folder = folder_of(model)
    return ModelAPI(folder, load_handler(folder)).document()


def every_path(model: str, explained: bool) -> set[str]:
    verbs = {"predictions": ("predict", "infer"), "explanations": ("explain", "explain")}
    found = {*openapi.common()["paths"], f"/v1/models/{model}"}
    found |= {f"/v2/models/{model}{version}{end}" for version in ("", "/versions/{version}") for end in ("", "/ready")}
    for route, (first, second) in verbs.items():
        if route == "predictions" or explained:
            found |= {f"/{route}/{model}", f"/{route}/{model}/{{version}}", f"/v1/models/{model}:{first}"}
            found |= {f"/v2/models/{model}/{second}", f"/v2/models/{model}/versions/{{version}}/{second}"}
    return found


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


def write_archive(store: Path, name: str, document: object, version: str = "1.0", metadata: str = "") -> str:
    """Write an archive that can be registered, and return its name.

    Args:
        document: its openapi.json: JSON, bytes as they are, or None without one.
        metadata: its open_inference.json, if it has one.
    """
    described = {"modelName": name, "modelVersion": version, "handler": "handler.py"}
    archive = store / f"{name}-{version}.mar"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(mar.MANIFEST, json.dumps({"runtime": "python", "model": described}))
        file.writestr("handler.py", "")
        if document is not None:
            file.writestr(openapi.NAME, document if isinstance(document, bytes) else json.dumps(document))
        if metadata:
            file.writestr(METADATA_NAME, metadata)
    return archive.name
