"""The OpenAPI document of a server: what every model has in common, and how the models' own documents are merged.

Each archive carries the document of its model, openapi.json. It is valid alone. The document of several models has the
`paths` and the `components` of all of them: what two of them both have, such as `/ping` and the errors, is equal.
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
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}

# The types of errors by status that TorchServe (...Exception), the frontend's patches and the proxy answer, beside
# those of the handlers.
SERVER_ERRORS = {
    400: ("BadRequestException", "InvalidForm", "BadRequest"),
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
    413: "The input exceeds a limit. If the whole body is too long for TorchServe, the answer has no content.",
    414: "The URL is too long. Send the input in the body.",
    415: "The Content-Encoding or the charset is not supported.",
    429: "Overload: retry.",
    500: "A bug of the handler or of the model. The server's log has the cause.",
    503: "The model has no workers, or the server starts or stops: retry.",
    504: "The answer took too long.",
    507: "The device does not have enough memory for this input.",
}
RETRIED = (429, 503, 504)


def error_types() -> dict[int, list[str]]:
    """Return the types of errors that a request for a prediction can get, by status."""
    types = {status: list(names) for status, names in SERVER_ERRORS.items()}
    for each in vars(errors).values():
        if isinstance(each, type) and issubclass(each, errors.ServingError) and each is not errors.ServingError:
            types.setdefault(each.code, []).append(each.__name__)
    return {status: sorted(types[status]) for status in sorted(types)}


def error_response(status: int, types: list[str]) -> dict:
    known = {"properties": {"code": {"const": status}, "type": {"enum": types}}}
    content = {JSON: {"schema": {"allOf": [{"$ref": "#/components/schemas/Error"}, known]}}}
    headers = {"headers": RETRY_AFTER} if status in RETRIED else {}
    return {"description": MEANINGS[status], **headers, "content": content}


def error_references() -> dict[str, dict]:
    """Return the errors for the `responses` of an operation: references to the common components."""
    return {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in error_types()}


def common() -> dict:
    """Return what the document of each model contains: the errors, the health of the server, its keys."""
    error = {
        "type": "object",
        "properties": {
            "code": {"type": "integer", "description": "the status"},
            "type": {"type": "string"},
            "message": {"type": "string", "description": "what was wrong, and what is accepted"},
        },
        "required": ["code", "type", "message"],
    }
    health = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    ping = {
        "operationId": "ping",
        "summary": "Whether the server runs. Its models may still be loading.",
        "tags": ["server"],
        "responses": {
            "200": {"description": "It runs.", "content": {JSON: {"schema": health}}},
            "500": {"description": "A model has lost its workers.", "content": {JSON: {"schema": health}}},
        },
    }
    key = {"type": "http", "scheme": "bearer", "description": "The inference key, where the server requires keys."}
    return HEAD | {
        "paths": {"/ping": {"get": ping}},
        "components": {
            "schemas": {"Error": error},
            "responses": {f"Error{status}": error_response(status, types) for status, types in error_types().items()},
            "securitySchemes": {"key": key},
        },
        "security": [{}, {"key": []}],
    }


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
