"""One TorchServe row -> the inputs of one request and its options.

TorchServe 0.12.0 hands over a raw body as {"body": value} and a form as {field: value, ...}. JSON arrives parsed and
text/* as str, unless they do not parse: then, like everything else, as bytearray.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from handlers.core.errors import (
    EmptyInput,
    InvalidJSON,
    InvalidOption,
    MissingField,
    TooManyInstances,
    UnknownField,
    UnsupportedInput,
)
from handlers.core.headers import content_type
from handlers.core.inputs import Inputs, Options, describe, kind_of

INSTANCES = "instances"


@dataclass(slots=True)  # not frozen: that doubles the time that making one takes
class Request:
    """What one request asks for.

    Attributes:
        inputs: one entry a sample.
        options: of the request, for all of its samples.
        many: whether the inputs came as {"instances": [...]}, to be answered as {"predictions": [...]}.
    """

    inputs: list[Inputs]
    options: Options
    many: bool = False


class RequestReader:
    """Reads requests as a handler's declarations say.

    Args:
        inputs: the handler's inputs.
        options: the handler's options.
        max_instances: how many samples one request may bring.

    Raises:
        TypeError: a declaration cannot be read: no input, an option without a default, one name for two fields.
    """

    def __init__(self, inputs: type[Inputs], options: type[Options], max_instances: int):
        self.inputs, self.options, self.max_instances = inputs, options, max_instances
        self.validate = inputs.__pydantic_validator__.validate_python  # half the time of model_validate
        self.kinds = {name: kind_of(field) for name, field in inputs.model_fields.items()}
        fields = options.model_fields
        self.option_types = {name: option_type(field) for name, field in fields.items()}
        if not self.kinds:
            raise TypeError(f"{inputs.__qualname__} declares no field: a model needs at least one input")
        if wrong := [name for name, field in fields.items() if field.is_required()]:
            raise TypeError(f"{options.__qualname__}.{wrong[0]} has no default: every option needs one")
        if twice := ({INSTANCES, "body"} & self.kinds.keys()) | (self.kinds.keys() & fields.keys()):
            raise TypeError(f"{inputs.__qualname__}.{twice.pop()} is the name of another field")
        self.defaults = options()
        [self.only] = self.kinds if len(self.kinds) == 1 else [None]
        self.accepted = self.describe_accepted()

    def describe_accepted(self) -> str:
        """Return what a request may look like, for error messages."""
        if self.only:
            ways = f'the input as raw body, as form field "{self.only}", or as JSON {{"{self.only}": ...}}'
        else:
            names = ", ".join(f'"{name}"' for name in self.kinds)
            fields = ", ".join(f'"{name}": ...' for name in self.kinds)
            ways = f"form fields {names}, JSON {{{fields}}}"
        options = ", ".join(f'"{name}"' for name in self.option_types)
        return f'Accepted: {ways} or {{"instances": [...]}} (with Content-Type: application/json)' + (
            f"; optionally with {options}." if options else "."
        )

    def read(self, row: Mapping, headers: Mapping) -> Request:
        """Read one row of a batch.

        Args:
            row: {field: value}, as TorchServe's worker gives it.
            headers: the request's own, as its client sent them.

        Raises:
            MalformedRequest: the request is not wrapped as `accepted` says, or a value is not of its field's kind.
            TooManyInstances: more than `max_instances` samples.
        """
        if row.keys() == {"body"}:
            body = row["body"]
            if isinstance(body, (bytes, bytearray)) and content_type(headers) == "application/json":
                body = self.parse_json(body)
            if isinstance(body, dict):
                return self.read_fields(body)
            if self.only is None:
                raise UnsupportedInput(f"The model takes several inputs, which a raw body cannot hold. {self.accepted}")
            return Request([self.read_inputs({self.only: body})], self.defaults)
        if not row and content_type(headers) == "application/x-www-form-urlencoded":
            # what curl -d sends by itself
            raise UnsupportedInput(f"The request is sent as a form and holds no fields. {self.accepted}")
        if not row:
            raise EmptyInput(f"The request has no body. {self.accepted}")
        return self.read_fields(row, form=True)

    def read_fields(self, fields: Mapping, form: bool = False) -> Request:
        known = self.kinds.keys() | self.option_types.keys() | {INSTANCES}
        if unknown := [name for name in fields if name not in known]:
            raise UnknownField(f"Unknown field {shorten(unknown[0])}. {self.accepted}")
        given = {name: value for name, value in fields.items() if name in self.kinds}
        if self.only and (self.only in given) == (INSTANCES in fields):
            raise MissingField(f'Exactly one of the fields "{self.only}" and "instances" is needed. {self.accepted}')
        if given and INSTANCES in fields:
            raise MissingField(f'"instances" and the fields of one input exclude each other. {self.accepted}')
        options = self.read_options({name: value for name, value in fields.items() if name in self.option_types})
        if INSTANCES not in fields:
            return Request([self.read_inputs(given, form)], options)
        instances = fields[INSTANCES]
        if isinstance(instances, (bytes, bytearray)) or (form and isinstance(instances, str)):
            instances = self.parse_json(instances)
        if not isinstance(instances, list) or not instances:
            raise UnsupportedInput('"instances" must be a list of at least one input.')
        if len(instances) > self.max_instances:
            raise TooManyInstances(
                f"{len(instances)} instances in one request; at most {self.max_instances} are accepted."
            )
        return Request([self.read_instance(instance) for instance in instances], options, many=True)

    def read_instance(self, instance: object) -> Inputs:
        """Read an object of the inputs' fields or, where there is only one field, its value."""
        if isinstance(instance, dict) and (self.only is None or instance.keys() == self.kinds.keys()):
            if unknown := [name for name in instance if name not in self.kinds]:
                raise UnknownField(f"Unknown field {shorten(unknown[0])} in an instance. {self.accepted}")
            return self.read_inputs(instance)
        if self.only is None:
            raise UnsupportedInput(f"An instance must be an object with the fields {', '.join(self.kinds)}.")
        if isinstance(instance, dict) and self.kinds[self.only]:
            raise UnknownField(f'An instance is an input, or an object with the one field "{self.only}".')
        return self.read_inputs({self.only: instance})

    def read_inputs(self, given: Mapping, form: bool = False) -> Inputs:
        values = {name: self.read_value(name, value, form) for name, value in given.items()}
        try:
            return self.validate(values)
        except ValidationError as exc:
            error = exc.errors(include_url=False)[0]
            name = ".".join(map(str, error["loc"]))
            if error["type"] == "missing" and len(error["loc"]) == 1:
                raise MissingField(f'The field "{name}" is missing. {self.accepted}') from exc
            raise UnsupportedInput(f'"{shorten(name)[1:-1]}" is invalid: {error["msg"]}.') from exc

    def read_value(self, name: str, value: object, form: bool) -> object:
        if isinstance(value, (bytearray, memoryview)):
            value = bytes(value)
        kind = self.kinds[name]
        if kind is None:
            return self.parse_json(value) if isinstance(value, bytes) or (form and isinstance(value, str)) else value
        if not isinstance(value, (bytes, str)):
            raise UnsupportedInput(
                f"An input must be bytes or a string, not a JSON {json_type(value)}. {self.accepted}"
            )
        if not value:
            raise EmptyInput(f"The input is empty. {self.accepted}")
        return kind.read(value)

    def read_options(self, given: Mapping) -> Options:
        """Options come as JSON values, or as the text of form fields."""
        if not given:
            return self.defaults
        values = {}
        for name, value in given.items():
            if isinstance(value, (bytes, bytearray)):
                value = value.decode("utf-8", "replace")
            validate = (
                self.option_types[name].validate_strings
                if isinstance(value, str)
                else self.option_types[name].validate_python
            )
            try:
                values[name] = None if value is None else validate(value, strict=True)
            except ValidationError:
                values[name] = None
            if values[name] is None:
                raise InvalidOption(f"{name} must be {describe(self.options.model_fields[name])}.")
        return self.options(**values)

    def parse_json(self, text: bytes | bytearray | str) -> object:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InvalidJSON(f"The request says that it is JSON and does not parse as JSON. {self.accepted}") from exc


def option_type(field: FieldInfo) -> TypeAdapter:
    return TypeAdapter(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)


def json_type(value: object) -> str:
    names = {dict: "object", list: "array", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


def shorten(name: object, limit: int = 40) -> str:
    text = str(name)
    return repr(text if len(text) <= limit else text[:limit] + "...")
