"""The OpenAPI document of one model, made from what its handler declares, with the folder's sample as the example."""

import ast
import base64
import json
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from bundle import openapi, samples
from bundle.build.dryrun import DryRun
from bundle.build.handler import labels
from bundle.build.imports import importable
from bundle.build.open_inference_api import OpenInferenceAPI
from bundle.catalog import ModelFolder
from bundle.errors import BundleError, blaming
from bundle.openapi import FILE, JSON, MULTIPART, OCTETS
from bundle.paths import relative
from handlers.core import inputs
from handlers.core.batch import BatchHandler
from handlers.core.inputs import Kind, PictureOptions, kind_of
from handlers.core.labelled import LabelledHandler
from handlers.core.request import B64, INSTANCES, URLENCODED

RAW = {"image": ("image/*", OCTETS), "sound": ("audio/*", OCTETS), "text": ("text/plain",)}  # Content-Types by kind
TEXT = {"type": "string", "minLength": 1}
BASE64 = TEXT | {"contentEncoding": "base64", "description": "The file in base64. A data: URL, too."}
BYTES = {B64: TEXT | {"contentEncoding": "base64", "description": "As TensorFlow Serving and KServe v1 write bytes."}}
LONGEST_EXAMPLE = 100_000  # characters of JSON
QUICK = {"precision": "float32"}  # settings of a handler that starts without comparing precisions


class Untitled(GenerateJsonSchema):
    """Generate schemas without titles of fields, which would only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class ModelAPI:
    """Make the OpenAPI document of a model.

    Args:
        folder: the model's.
        handler: the folder's, with its settings.

    Raises:
        BundleError: a type that the handler declares has no JSON schema.
    """

    def __init__(self, folder: ModelFolder, handler: BatchHandler):
        self.folder, self.handler = folder, handler
        self.kinds = {name: kind_of(field) for name, field in handler.Inputs.model_fields.items()}
        self.only_input = next(iter(self.kinds)) if len(self.kinds) == 1 else None
        self.explained = type(handler).explain is not BatchHandler.explain
        self.explain_options = handler.ExplainOptions or handler.Options
        self.limits = (
            handler.option_limits(labels(folder, handler) or []) if isinstance(handler, LabelledHandler) else {}
        )
        self.schemas: dict[str, dict] = {}
        self.examples: dict[str, dict] = {}
        self.declared = self.declared_schemas()
        if any(self.kinds.values()):
            self.schemas[self.key("Bytes")] = closed({"required": [B64]}, BYTES)

    def document(self, answer: object = None) -> dict:
        """Return the document.

        Args:
            answer: the model's answer to the folder's sample. Both become examples; None leaves them out.
        """
        if answer is not None:
            self.add_example("request", self.sample())
            self.add_example("answer", answer)
        self.schemas[self.key("Inputs")] = closed(self.declared["Inputs"], self.json_fields())
        name, version = self.folder.name, self.folder.bundle.version
        paths = openapi.model_paths(name, "predict", self.operation("", self.handler.Options))
        if self.explained:
            paths |= openapi.model_paths(name, "explain", self.operation("Explain", self.explain_options))
        paths |= openapi.ready_paths(name) | self.open_inference(answer)
        components = {"schemas": self.schemas, "examples": self.examples}
        components["parameters"] = openapi.version_parameter(name, version)
        return openapi.merge([{"paths": paths, "components": components}])

    def open_inference(self, answer: object) -> dict[str, dict]:
        """Return the paths of the Open Inference Protocol, and keep their schemas and examples."""
        api = OpenInferenceAPI(self.folder.name, self.folder.bundle.version, self.handler)
        verbs = {"infer": ("", self.handler.Options)}
        if self.explained:
            verbs["explain"] = ("Explain", self.explain_options)
        paths = api.questions()
        for verb, (prefix, options) in verbs.items():
            paths |= api.inference(verb, self.option_fields(prefix), pictures=issubclass(options, PictureOptions))
        self.schemas |= api.schemas
        request = self.examples.get(self.key("request"), {}).get("value")
        for name, value in api.examples(request, answer).items():
            self.add_example(name, value)
        for item in (each for path, each in paths.items() if path.endswith("/infer")):
            operation = item["post"]
            operation["requestBody"]["content"][JSON] |= self.example("inferRequest")
            operation["responses"]["200"]["content"][JSON] |= self.example("inferAnswer")
        return paths

    def key(self, name: str) -> str:
        """Return the name of a component, which no other model has: no name of a type contains a hyphen."""
        return f"{self.folder.name}-{name}"

    def reference(self, name: str) -> dict:
        return {"$ref": f"#/components/schemas/{self.key(name)}"}

    # --- schemas -------------------------------------------------------------------------------------------------

    def declared_schemas(self) -> dict[str, dict]:
        """Return the schemas of the types that the handler declares. The types inside of them become components."""
        handler = self.handler
        types: dict[str, Any] = {"Inputs": handler.Inputs, "Options": handler.Options, "Answer": handler.Answer}
        if self.explained:
            types |= {"ExplainOptions": self.explain_options, "ExplainAnswer": handler.ExplainAnswer}
        prefix = self.reference("")["$ref"]
        adapters: list[Any] = []
        try:
            with importable(type(handler)):
                for name, declared in types.items():
                    mode = "serialization" if name.endswith("Answer") else "validation"
                    adapters.append((name, mode, TypeAdapter(declared)))
            found, rest = TypeAdapter.json_schemas(
                adapters, ref_template=f"{prefix}{{model}}", schema_generator=Untitled
            )
        except PydanticUserError as exc:
            raise BundleError(
                f"{relative(self.folder.handler_file)}: a type that {type(handler).__name__} declares has no JSON "
                f"schema: {str(exc).splitlines()[0]}"
            ) from exc
        definitions = rest.get("$defs", {})
        schemas, inlined = {}, set()
        for (name, _), schema in found.items():
            reference = schema.get("$ref", "").removeprefix(prefix)
            inlined.add(reference)
            schemas[cast("str", name)] = without_title(definitions.get(reference, schema))
        self.schemas |= {self.key(name): each for name, each in definitions.items() if name not in inlined}
        return schemas

    def form_fields(self) -> dict[str, dict]:
        """Return the schema of each input in a URL-encoded form, where files and texts are strings."""
        declared = self.declared["Inputs"]["properties"]
        return {name: value_schema(kind, declared[name]) for name, kind in self.kinds.items()}

    def json_fields(self) -> dict[str, dict]:
        """Return the schema of each input in JSON, where a file or a text may also be {"b64": "..."}."""
        return {
            name: {"anyOf": [schema, self.reference("Bytes")]} if self.kinds[name] else schema
            for name, schema in self.form_fields().items()
        }

    def option_fields(self, verb: str) -> dict[str, dict]:
        """Return the schema of each option. One with limits is a component, because labels may be thousands."""
        declared = self.declared[f"{verb}Options"].get("properties", {})
        fields = {name: without_null(schema) for name, schema in declared.items()}
        for name in [each for each in fields if each in self.limits]:
            self.schemas[self.key(name)] = fields[name] | self.limits[name]
            fields[name] = self.reference(name)
        return fields

    def instances(self) -> dict:
        """Return the schema of `instances`: objects or, of a model with one input, its values."""
        sample = self.reference("Inputs")
        items = {"anyOf": [sample, *self.json_fields().values()]} if self.only_input else sample
        return {"type": "array", "items": items, "minItems": 1, "maxItems": self.handler.settings.max_instances}

    def file_field(self, name: str) -> dict:
        """Return the schema of an input in a multipart form. The only input may be sent several times."""
        kind = self.kinds[name]
        one = FILE if kind and kind.name != "text" else self.form_fields()[name]
        if name != self.only_input:
            return one
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.handler.settings.max_instances}]}

    # --- operations ----------------------------------------------------------------------------------------------

    def operation(self, verb: str, options: type[inputs.Options]) -> dict:
        """Return an operation.

        Args:
            verb: "" for predictions, "Explain" for explanations.
            options: of its requests.
        """
        name, fields = self.folder.name, self.option_fields(verb)
        answer = self.reference(f"{verb}Answer")
        self.schemas[self.key(f"{verb}Answer")] = self.declared[f"{verb}Answer"]
        several = {"type": "array", "items": answer}
        self.schemas[self.key(f"{verb}Answers")] = closed({"required": ["predictions"]}, {"predictions": several})
        content: dict[str, dict] = {JSON: {"schema": {"anyOf": [answer, self.reference(f"{verb}Answers")]}}}
        if not verb:
            content[JSON] |= self.example("answer")
        if issubclass(options, PictureOptions):
            content["image/png"] = {"schema": FILE | {"contentMediaType": "image/png"}}
        return {
            "summary": f"{'Explain the answer of' if verb else 'Ask'} the model {name}.",
            "description": self.summary(),
            "tags": [name],
            "parameters": [{"name": each, "in": "query", "schema": schema} for each, schema in fields.items()],
            "requestBody": {"required": True, "content": self.bodies(verb, fields)},
            "responses": {"200": {"description": "The answer, or one for each instance.", "content": content}}
            | openapi.error_references(),
        }

    def bodies(self, verb: str, options: dict[str, dict]) -> dict:
        """Return the forms of a request's body by their Content-Type."""
        declared, fields, example = self.declared["Inputs"], self.json_fields(), self.example("request")
        self.schemas[self.key(f"{verb}Request")] = closed(declared, fields | options)
        many = {INSTANCES: self.instances()} | options
        self.schemas[self.key(f"{verb}Requests")] = closed({"required": [INSTANCES]}, many)
        either = {"anyOf": [self.reference(f"{verb}Request"), self.reference(f"{verb}Requests")]}
        encoding = {name: {"contentType": JSON} for name, kind in self.kinds.items() if kind is None}
        files = {
            name: {"contentType": ", ".join(RAW[kind.name])}
            for name, kind in self.kinds.items()
            if kind and kind.name in RAW
        }
        parts = {name: self.file_field(name) for name in fields}
        bodies: dict[str, dict] = {
            JSON: {"schema": either} | example,
            MULTIPART: {"schema": closed(declared, parts | options), "encoding": files | encoding},
            URLENCODED: {"schema": closed(declared, self.form_fields() | options), "encoding": encoding} | example,
        }
        kind = self.kinds[self.only_input] if self.only_input else None
        for media_type in RAW.get(kind.name, (OCTETS,)) if kind else ():
            bodies[media_type] = self.raw_text() if kind and kind.name == "text" else {"schema": FILE}
        return bodies

    def raw_text(self) -> dict:
        """Return the media type of a text that is the whole body."""
        request = self.examples.get(self.key("request"), {}).get("value", {})
        return {"schema": TEXT} | ({"example": request[self.only_input]} if self.only_input in request else {})

    def summary(self) -> str:
        """Return the first line of the handler's file, which says what the handler does."""
        documented = ast.get_docstring(ast.parse(self.folder.handler_file.read_text())) or ""
        return documented.partition("\n")[0]

    # --- examples ------------------------------------------------------------------------------------------------

    def add_example(self, name: str, value: object) -> None:
        """Keep a value as an example, unless it is None or too long for a document that people read."""
        if value is not None and len(json.dumps(value)) <= LONGEST_EXAMPLE:
            self.examples[self.key(name)] = {"value": value}

    def example(self, name: str) -> dict:
        """Return the reference to an example, for a media type; {} if there is none."""
        key = self.key(name)
        return {"examples": {"sample": {"$ref": f"#/components/examples/{key}"}}} if key in self.examples else {}

    def sample(self) -> dict | None:
        """Return the folder's sample as the JSON of a request; None if it has none that JSON can express."""
        file = self.folder.sample_file
        if file is None:
            return None
        content = file.read_bytes()
        if samples.headers(file):
            value = json.loads(content)
            return value if isinstance(value, dict) or self.only_input is None else {self.only_input: value}
        if self.only_input is None:
            return None
        kind = self.kinds[self.only_input]
        if kind and kind.name == "text":
            return {self.only_input: content.decode(errors="replace")}
        return {self.only_input: base64.b64encode(content).decode()}

    def check_answer(self, answer: object) -> None:
        """Check a real answer against the declared type.

        Raises:
            BundleError: the answer has another type, or has fields that are not declared.
        """
        problem = ""
        try:
            with importable(type(self.handler)):
                adapter: TypeAdapter = TypeAdapter(self.handler.Answer)
            if adapter.validate_python(answer, strict=True) != answer:
                problem = "it has fields that are not declared"
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        if problem:
            raise BundleError(
                f"{relative(self.folder.handler_file)}: the answer to {self.folder.bundle.sample} is not of the type "
                f"{type(self.handler).__name__}.Answer: {problem}."
            )


def closed(declared: dict, properties: dict[str, dict]) -> dict:
    """Return the schema of an object that has only these properties.

    Args:
        declared: the schema whose `required` and `anyOf` it keeps.
        properties: by name.
    """
    kept = {key: declared[key] for key in ("required", "anyOf") if key in declared}
    return {"type": "object", "properties": properties, **kept, "additionalProperties": False}


def without_title(schema: dict) -> dict:
    return {key: value for key, value in schema.items() if key != "title"}


def value_schema(kind: Kind | None, declared: dict) -> dict:
    """Return the schema of an input: a string for its kind, or as declared."""
    if kind is None:
        return without_null(declared)
    return TEXT if kind.name == "text" else BASE64


def without_null(schema: dict) -> dict:
    """Return the schema of a field without null: whoever does not want it leaves the field out."""
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    choices = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(choices) == 1:
        return choices[0] | rest
    return rest | ({"anyOf": choices} if choices else {})


def answer_of(archive: Path, folder: ModelFolder) -> object:
    """Return the model's answer to the folder's sample, computed by the archive in this process.

    Raises:
        BundleError: the folder has no sample, the model or its handler fails, or the answer is an error.
    """
    if folder.bundle.sample is None:
        raise BundleError("The folder has no `sample`.")
    sample = folder.existing(folder.bundle.sample)
    sent, content = samples.headers(sample), sample.read_bytes()
    with blaming(lambda exc: BundleError(f"The model fails on its sample: {type(exc).__name__}: {exc}")):
        row = {"body": json.loads(content) if sent else content}
        with DryRun(archive, batch_size=1, settings=QUICK) as dry_run:
            [(status, body)] = dry_run.predict([row], [sent])
    if status != 200:
        raise BundleError(f"The answer to {folder.bundle.sample} is {status}.")
    return body
