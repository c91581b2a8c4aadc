"""The OpenAPI document of a server: what every model has in common, and how the models' own documents are merged.

Each archive carries the document of its model, openapi.json. It is valid alone. The document of several models has the
`paths` and the `components` of all of them: what two of them both have, such as `/ping` and the errors, is equal. A
running server merges those of its models in the same way (Schema.java); its jar has what is `common`, and `generic` for
archives without a document.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from bundle import mar
from bundle.errors import BundleError
from handlers.core import errors

NAME = "openapi.json"  # in an archive
HEAD = {"openapi": "3.1.0", "info": {"title": "Models", "version": "1"}, "servers": [{"url": "/"}]}
JSON = "application/json"
OCTETS = "application/octet-stream"
MULTIPART = "multipart/form-data"
FILE = {"type": "string", "format": "binary", "contentMediaType": OCTETS}  # older generators need the format
ANYTHING: dict = {"schema": {}}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}

# The types of errors by status that TorchServe (...Exception), the frontend's patches and the proxy answer, beside
# those of the handlers.
SERVER_ERRORS = {
    400: ("BadRequestException", "InvalidForm", "InvalidKeyException", "BadRequest"),
    404: ("ModelNotFoundException", "ModelVersionNotFoundException", "NotFound"),
    413: ("BodyTooLarge",),
    414: ("URITooLong",),
    429: ("QueueFull", "TooManyRequests"),
    500: ("InternalServerException", "WorkerDied", "InvalidAnswer", "PredictionFailed"),
    503: ("ServiceUnavailableException", "NoWorkers", "WorkerDied", "ServerUnavailable"),
    504: ("WorkerTimeout", "ClientTimeout", "UpstreamTimeout"),
    507: ("InternalServerException",),
}
MEANINGS = {
    400: "The request is invalid: correct it.",
    404: "The server has no such model, or no such version of it.",
    413: "The input exceeds a limit.",
    414: "The URL is too long. Send the input in the body.",
    415: "The Content-Encoding or the charset is not supported.",
    429: "Overload: retry.",
    500: "A bug of the handler or of the model. The server's log has the cause.",
    503: "The model has no workers, or the server starts or stops: retry.",
    504: "The answer took too long.",
    507: "The device does not have enough memory for this input.",
}
RETRIED = (429, 503, 504)
OPEN_INFERENCE = "OpenInference"  # begins the names of the common components of this protocol


def error_types() -> dict[int, list[str]]:
    """Return the types of errors that a request for a prediction can get, by status."""
    types = {status: list(names) for status, names in SERVER_ERRORS.items()}
    for each in vars(errors).values():
        if isinstance(each, type) and issubclass(each, errors.ServingError) and each is not errors.ServingError:
            types.setdefault(each.code, []).append(each.__name__)
    return {status: sorted(types[status]) for status in sorted(types)}


def error_response(status: int, types: list[str]) -> dict:
    known = {"properties": {"code": {"type": "integer", "enum": [status]}, "type": {"type": "string", "enum": types}}}
    content = {JSON: {"schema": {"allOf": [{"$ref": "#/components/schemas/Error"}, known]}}}
    headers = {"headers": RETRY_AFTER} if status in RETRIED else {}
    return {"description": MEANINGS[status], **headers, "content": content}


def error_references(protocol: str = "") -> dict[str, dict]:
    """Return the errors for the `responses` of an operation: references to the common components."""
    return {str(status): {"$ref": f"#/components/responses/{protocol}Error{status}"} for status in error_types()}


def described(description: str, schema: dict, **more: object) -> dict:
    """Return a response whose content is JSON."""
    return {"description": description, "content": {JSON: {"schema": schema, **more}}}


def component(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def record(required: dict[str, dict], **optional: dict) -> dict:
    """Return the schema of an object."""
    return {"type": "object", "properties": required | optional, "required": list(required)}


def question(operation: str, summary: str, responses: dict[str, dict], tag: str = "server") -> dict:
    """Return the item of a path that is asked with GET."""
    return {"get": {"operationId": operation, "summary": summary, "tags": [tag], "responses": responses}}


def readiness(what: str, schema: dict) -> dict[str, dict]:
    """Return the responses of a question whether something is ready."""
    return {"200": described(f"{what} ready.", schema), "503": described(f"{what} not ready: retry.", schema)}


def server_paths() -> dict[str, dict]:
    """Return the routes that do not name a model."""
    name, flag = {"type": "string"}, {"type": "boolean"}
    names = {"type": "array", "items": name}
    health = component("Health")
    summary = "Whether the server runs. Its models may still be loading."
    starting = described("Behind the proxy: not all models are ready.", {"anyOf": [health, component("Error")]})
    ping = {
        "200": described("It runs.", health),
        "500": described("A model has lost its workers.", health),
        "503": starting,
    }
    models = record({"models": names})
    about = record({"name": name, "version": name, "extensions": names})
    invocation = {
        "operationId": "invocations",
        "summary": "A prediction of the model that the query names.",
        "description": "Its options, bodies and answers are those of /predictions/NAME.",
        "tags": ["server"],
        "parameters": [
            {
                "name": "model_name",
                "in": "query",
                "description": "It may be missing if the server has only one model.",
                "schema": name,
            }
        ],
        "requestBody": {"required": True, "content": {JSON: ANYTHING, OCTETS: {"schema": FILE}}},
        "responses": {"200": {"description": "The answer.", "content": {JSON: ANYTHING, "image/png": {"schema": FILE}}}}
        | error_references(),
    }
    itself = {"200": described("An OpenAPI document.", {"type": "object"})}
    live = {"200": described("It answers.", record({"live": flag}))}
    return {
        "/ping": question("ping", summary, ping),
        "/openapi.json": question("schema", "This document: the models that are registered now.", itself),
        "/invocations": {"post": invocation},
        "/": question("serverAlive", "Whether the server answers.", {"200": described("It does.", health)}),
        "/v1/models": question("models", "The names of all models.", {"200": described("Their names.", models)}),
        "/v2": question("serverMetadata", "What the server is.", {"200": described("Its name.", about)}),
        "/v2/health/live": question("serverLive", "Whether the server answers.", live),
        "/v2/health/ready": question(
            "serverReady", "Whether all models have their workers.", readiness("They are", record({"ready": flag}))
        ),
    }


def common() -> dict:
    """Return what the document of each model contains: the server's own routes, the errors, the keys."""
    name = {"type": "string"}
    error = record(
        {
            "code": {"type": "integer", "description": "the status"},
            "type": name,
            "message": {"type": "string", "description": "what was wrong, and what is accepted"},
        }
    )
    tensors = {
        "type": "array",
        "items": record({"name": name, "datatype": name, "shape": {"type": "array", "items": {"type": "integer"}}}),
    }
    model: dict[str, dict] = {"name": name, "versions": {"type": "array", "items": name}, "platform": name}
    types = error_types()
    responses = {f"Error{status}": error_response(status, types[status]) for status in types}
    responses |= {f"{OPEN_INFERENCE}Error{status}": open_inference_error(status) for status in types}
    key = {"type": "http", "scheme": "bearer", "description": "The inference key, where the server requires keys."}
    return HEAD | {
        "paths": server_paths(),
        "components": {
            "schemas": {
                "Error": error,
                "Health": record({"status": name}),
                "ModelReady": record({"name": name, "ready": {"type": "boolean"}}),
                f"{OPEN_INFERENCE}Error": record({"error": {"type": "string", "description": "what was wrong"}}),
                f"{OPEN_INFERENCE}Model": record(model | {"inputs": tensors, "outputs": tensors}),
            },
            "responses": responses,
            "securitySchemes": {"key": key},
        },
        "security": [{}, {"key": []}],
    }


def open_inference_error(status: int) -> dict:
    headers = {"headers": RETRY_AFTER} if status in RETRIED else {}
    return described(MEANINGS[status], component(f"{OPEN_INFERENCE}Error")) | headers


def version_parameter(name: str, version: str) -> dict[str, dict]:
    """Return the component for the version in the paths of a model. A running server lists all versions there."""
    described = "The rest of this operation is that of the default version."
    schema = {"type": "string", "enum": [version]}
    parameter = {"name": "version", "in": "path", "required": True, "description": described, "schema": schema}
    return {f"{name}-version": parameter}


def versioned(name: str, item: dict) -> dict:
    """Return a path's item for a path with the version."""
    return {"parameters": [{"$ref": f"#/components/parameters/{name}-version"}], **item}


def model_paths(name: str, verb: str, operation: dict) -> dict[str, dict]:
    """Return the paths of a model's operation: TorchServe's own, the same with the version, and that of KServe's v1.

    Args:
        verb: "predict" or "explain".
    """
    path = f"/{'predictions' if verb == 'predict' else 'explanations'}/{name}"
    return {
        path: {"post": {"operationId": f"{verb}_{name}", **operation}},
        f"{path}/{{version}}": versioned(name, {"post": {"operationId": f"{verb}Version_{name}", **operation}}),
        f"/v1/models/{name}:{verb}": {"post": {"operationId": f"{verb}V1_{name}", **operation}},
    }


def ready_paths(name: str) -> dict[str, dict]:
    """Return the paths that say whether a model is ready."""
    answers = readiness("It is", component("ModelReady"))
    answers["404"] = {"$ref": "#/components/responses/Error404"}
    return {f"/v1/models/{name}": question(f"readyV1_{name}", f"Whether the model is ready: {name}.", answers, name)}


def generic(name: str, version: str) -> dict:
    """Return what is known of a model whose handler does not declare what it accepts: paths and components."""
    anything = {"*/*": ANYTHING}
    form = {"schema": {"type": "object", "properties": {"data": FILE}}}  # the name that TorchServe's handlers read
    operation = {
        "summary": f"Ask the model {name}.",
        "description": "The model's handler does not declare what it accepts.",
        "tags": [name],
        "parameters": [],
        "requestBody": {"required": True, "content": {JSON: ANYTHING, MULTIPART: form, **anything}},
        "responses": {
            "200": {"description": "The answer.", "content": anything},
            "default": {"description": "An error of the server or of the handler.", "content": anything},
        },
    }
    paths = model_paths(name, "predict", operation) | ready_paths(name)
    return {"paths": paths, "components": {"parameters": version_parameter(name, version)}}


def merge(documents: Iterable[dict], server: str = "/") -> dict:
    """Return one document with the paths and the components of all of them.

    Args:
        documents: of archives. Where two archives have different versions of a common part, the last one's is taken.
        server: the URL of the server.
    """
    merged = common()
    merged["servers"] = [{"url": server}]
    for document in documents:
        merged["paths"].update(document["paths"])
        for kind, named in document["components"].items():
            merged["components"].setdefault(kind, {}).update(named)
    return merged


def read(archive: Path) -> dict | None:
    """Return the document in an archive; None if it has none, because its handler is not a `BatchHandler`.

    Raises:
        BundleError: the file is not a model archive, or the document is not JSON.
    """
    if NAME not in mar.names(archive):
        return None
    try:
        return dict(json.loads(mar.read(archive, NAME)))
    except ValueError as exc:
        raise BundleError(f"{NAME} in {archive.name} is not a JSON object. Build the archive again.") from exc
