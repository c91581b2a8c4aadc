"""The models of a server, as their OpenAPI documents describe them: what the page asks a person for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PREDICT, EXPLAIN = "/predictions/", "/explanations/"
JSON, PNG, MULTIPART = "application/json", "image/png", "multipart/form-data"
KINDS = {"image": "image", "audio": "sound", "text": "text"}  # of an input, by the first part of its Content-Type
OF_PICTURES = ("format", "overlay")  # options that the page sets itself, to show pictures


@dataclass(frozen=True)
class Field:
    """An input of a model.

    Attributes:
        kind: image, sound, text, json, or file.
        example: as in the JSON of a request; None if the document has none.
    """

    name: str
    kind: str
    example: Any = None


@dataclass(frozen=True)
class Option:
    """An option of a request.

    Attributes:
        kind: choice, boolean, integer, number, or string.
        about: for the person: the description, and the values that are accepted.
        choices: the values of a choice.
        default: the value without the option; None if the document names none.
    """

    name: str
    kind: str
    about: str
    choices: tuple[str | int | float, ...] = ()
    default: Any = None


@dataclass(frozen=True)
class Operation:
    """What a person can ask a model for: an answer, or its explanation.

    Attributes:
        path: of the URL.
        options: without those of pictures.
        picture: the options with which it answers a picture; None if it cannot.
    """

    path: str
    options: tuple[Option, ...]
    picture: dict[str, str] | None


@dataclass(frozen=True)
class Model:
    name: str
    summary: str
    fields: tuple[Field, ...]
    predict: Operation
    explain: Operation | None


def models(document: dict) -> Iterator[Model]:
    """Yield the models of an OpenAPI document, in its order."""
    for path, item in document["paths"].items():
        name = path.removeprefix(PREDICT)
        if path != name and "/" not in name and "post" in item:
            explained = document["paths"].get(EXPLAIN + name, {}).get("post")
            yield Model(
                name=name,
                summary=item["post"].get("description", ""),
                fields=tuple(fields(document, item["post"])),
                predict=operation(document, path, item["post"]),
                explain=operation(document, EXPLAIN + name, explained) if explained else None,
            )


def fields(document: dict, described: dict) -> Iterator[Field]:
    """Yield the inputs of an operation: the parts of its multipart form that are not options."""
    bodies = described["requestBody"]["content"]
    options = {parameter["name"] for parameter in described.get("parameters", ())}
    form, example = bodies[MULTIPART], example_of(document, bodies.get(JSON, {}))
    for name in form["schema"]["properties"]:
        if name not in options:
            sent_as = form.get("encoding", {}).get(name, {}).get("contentType", "")
            kind = "json" if sent_as == JSON else KINDS.get(sent_as.partition("/")[0], "file")
            yield Field(name, kind, example.get(name))


def example_of(document: dict, body: dict) -> dict:
    """Return the first example of a body; {} if it has none, or one that is not an object."""
    for example in body.get("examples", {}).values():
        value = resolved(document, example).get("value")
        return value if isinstance(value, dict) else {}
    return {}


def operation(document: dict, path: str, described: dict) -> Operation:
    parameters = {each["name"]: resolved(document, each["schema"]) for each in described.get("parameters", ())}
    answers = described["responses"]["200"].get("content", {})
    picture = {"format": "png"} | ({"overlay": "true"} if "overlay" in parameters else {})
    shown = (option(name, schema) for name, schema in parameters.items() if name not in OF_PICTURES)
    return Operation(path, tuple(each for each in shown if each), picture if PNG in answers else None)


def option(name: str, schema: dict) -> Option | None:
    """Return an option; None if it has only one value."""
    if "const" in schema:
        return None
    variants = [schema, *schema.get("anyOf", ())]
    choices = next((tuple(each["enum"]) for each in variants if "enum" in each), ())
    kind = "choice" if choices else next((each["type"] for each in variants if "type" in each), "string")
    return Option(name, kind, about(schema), choices, schema.get("default"))


def about(schema: dict) -> str:
    """Return the description of an option and its bounds, such as "How many classes. From 1 to 10."."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if schema.get("type") == "integer" and "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + 1
    if low is not None and high is not None:
        bounds = f"From {low} to {high}."
    else:
        bounds = f"At least {low}." if low is not None else f"At most {high}." if high is not None else ""
    return " ".join(filter(None, (schema.get("description", ""), bounds)))


def resolved(document: dict, value: dict) -> dict:
    """Return a part of the document, or the component that it refers to; what stands beside the reference stays."""
    if "$ref" not in value:
        return value
    found: Any = document
    for key in value["$ref"].removeprefix("#/").split("/"):
        found = found[key]
    return {**found, **{key: each for key, each in value.items() if key != "$ref"}}
