"""Read one row of TorchServe: the inputs and the options of one request.

TorchServe 0.12.0 passes a raw body as {"body": value}, and a form as {field: value, ...}. A value is parsed JSON or, of
text/*, a str. Whatever does not parse, and every other type, is a bytearray. A field that is sent several times is
`Repeated` (`wire.py`).
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from handlers.core.errors import (
    EmptyInput,
    InvalidJSON,
    InvalidOption,
    MissingField,
    RepeatedField,
    TooManyInstances,
    UnknownField,
    UnsupportedEncoding,
    UnsupportedInput,
)
from handlers.core.headers import RequestHeaders, request_headers
from handlers.core.inputs import (
    BASE64_DATA_URL,
    Inputs,
    Options,
    PictureOptions,
    binary,
    describe_option,
    in_field,
    is_base64,
    kind_of,
)
from handlers.core.slots import Answer, Response
from handlers.core.strict_json import parse_json
from handlers.core.texts import in_charset

URLENCODED = "application/x-www-form-urlencoded"
B64 = "b64"  # {"b64": "..."} is base64 in the JSON of TensorFlow Serving and Vertex AI
BODY, INSTANCES = "body", "instances"  # the names of TorchServe and of the bundle, which no input or option may have


class Repeated(list):
    """The values of a form field that is sent several times."""

    @classmethod
    def added(cls, before: object, value: object) -> "Repeated":
        if not isinstance(before, Repeated):
            return cls([before, value])
        before.append(value)  # a copy each time would take minutes for a form of many fields
        return before


class UnparsedJSON(bytearray):
    """The content of a part of a form that its Content-Type calls JSON, although it is not."""


@dataclass(slots=True)  # not frozen: that doubles the time that making one takes
class Request:
    """The content of one request.

    Attributes:
        inputs: one entry per sample: what `decode` takes, or tensors that need no decoding.
        options: for all samples of the request.
        many: whether the inputs came as {"instances": [...]}; then the response is {"predictions": [...]}.
        respond: makes the response of the answers instead, in the form of another protocol.
    """

    inputs: list[Any]
    options: Options
    many: bool = False
    respond: Callable[[list[Answer]], Response] | None = None


class RequestReader:
    """Read requests with the inputs and options that a handler declares.

    Args:
        inputs: the handler's inputs.
        options: the handler's options.
        max_instances: the most samples that one request may have.

    Raises:
        TypeError: a declaration is invalid: no input, an option without a default, or a name that is used twice.
    """

    def __init__(self, inputs: type[Inputs], options: type[Options], max_instances: int):
        self.inputs, self.options, self.max_instances = inputs, options, max_instances
        self.validate = inputs.__pydantic_validator__.validate_python  # half the time of model_validate
        self.kinds = {name: kind_of(field) for name, field in inputs.model_fields.items()}
        self.optional = {name for name, field in inputs.model_fields.items() if not field.is_required()}
        fields = options.model_fields
        self.option_types = {name: option_type(field) for name, field in fields.items()}
        if not self.kinds:
            raise TypeError(f"{inputs.__qualname__} declares no field: a model needs at least one input")
        if required := [name for name, field in fields.items() if field.is_required()]:
            raise TypeError(f"{options.__qualname__}.{required[0]} has no default: every option needs one")
        names = [BODY, INSTANCES, *self.kinds, *fields]
        if taken := [name for name in self.kinds.keys() | fields.keys() if names.count(name) > 1]:
            raise TypeError(f"{inputs.__qualname__} or {options.__qualname__}: the name {taken[0]} is taken; rename it")
        self.defaults = options()
        self.only_input: str | None = next(iter(self.kinds)) if len(self.kinds) == 1 else None
        only_kind = self.kinds[self.only_input] if self.only_input else None
        self.takes_text = only_kind is not None and only_kind.name == "text"
        self.takes_base64 = only_kind is not None and only_kind.read is binary
        self.accepted = self.describe_accepted()

    def describe_accepted(self) -> str:
        """Return the accepted forms of a request, for error messages."""
        if self.only_input:
            name = self.only_input
            raw = "raw body, as " if self.kinds[name] else ""  # a JSON body is read as an object of fields
            ways = f'the input as {raw}form field "{name}", or as JSON {{"{name}": ...}}'
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
            row: {field: value}, as TorchServe passes it.
            headers: the headers of this request, as its client sent them.

        Raises:
            MalformedRequest: the request does not have a form that `accepted` describes, or a value is not of its
                field's kind.
            UndecodableText: a text is not in the charset of its Content-Type, UTF-8 by default.
            UnsupportedEncoding: the body is compressed, or its charset is unknown.
            TooManyInstances: more than `max_instances` samples.
        """
        sent = request_headers(headers)
        check_encoding(sent)
        query = self.read_query(sent.query)
        if row.keys() == {BODY} and not isinstance(row[BODY], Repeated):
            body = row[BODY]
            if sent.media_type == "application/json":
                if isinstance(body, (bytes, bytearray)):  # otherwise, it is parsed
                    body = self.parse_json(in_charset(body, sent.charset))
            elif self.takes_text:
                body = in_charset(body, sent.charset)
            if isinstance(body, dict):
                return self.read_fields(body, query)
            if self.only_input is None:
                raise UnsupportedInput(f"The model has several inputs, so a raw body is not accepted. {self.accepted}")
            return Request([self.read_inputs({self.only_input: body})], self.read_options(query))
        if not row and sent.media_type == URLENCODED:
            # curl -d sends this type by default
            raise UnsupportedInput(
                "The body has Content-Type application/x-www-form-urlencoded, but no form fields. Set its own "
                f"Content-Type. {self.accepted}"
            )
        if not row:
            raise EmptyInput(f"The request has no body. {self.accepted}")
        if sent.media_type == URLENCODED:
            if encoded := self.base64_of(row):
                return Request([self.read_inputs({self.only_input: encoded})], self.read_options(query))
            if sent.charset:
                row = {name: self.field_in_charset(name, value, sent.charset) for name, value in row.items()}
        return self.read_fields(row, query, form=True)

    def base64_of(self, row: Mapping) -> bytes:
        """Return a body that is base64, if TorchServe took it for a form because it ends in "="; b"" otherwise."""
        [*names] = row
        if not self.takes_base64 or len(names) != 1 or names[0] == self.only_input:
            return b""
        value = row[names[0]]
        body = names[0].encode() + b"=" + bytes(value) if isinstance(value, bytearray) else b""
        return body if BASE64_DATA_URL.match(body) or is_base64(body) else b""

    def field_in_charset(self, name: str, value: object, charset: str) -> object:
        """Decode a field of a form, unless it is a file."""
        kind = self.kinds.get(name)
        if kind is not None and kind.name != "text":
            return value
        if isinstance(value, Repeated):
            return Repeated(in_charset(each, charset) for each in value)
        return in_charset(value, charset)

    def read_query(self, query: str) -> dict[str, str]:
        """Return the options in the query of the URL."""
        if not query:
            return {}
        given: dict[str, str] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name in given:
                raise RepeatedField(f"The query has {quote(name)} twice; it is accepted once.")
            given[name] = value
        if unknown := [name for name in given if name not in self.option_types]:
            names = ", ".join(f'"{name}"' for name in self.option_types)
            accepted = f"Accepted in the query: {names}." if names else "This model has no options."
            raise UnknownField(f"Unknown query parameter {quote(unknown[0])}. {accepted} Send inputs in the body.")
        return given

    def read_fields(self, fields: Mapping, query: Mapping, form: bool = False) -> Request:
        known = self.kinds.keys() | self.option_types.keys() | {INSTANCES}
        if unknown := [name for name in fields if name not in known]:
            raise UnknownField(f"Unknown field {quote(unknown[0])}. {self.accepted}")
        repeated = [name for name, value in fields.items() if isinstance(value, Repeated)]
        if repeated and repeated != [self.only_input]:
            raise RepeatedField(
                f'The field "{repeated[0]}" is sent {len(fields[repeated[0]])} times; it is accepted once. '
                f"{self.accepted}"
            )
        given = {name: value for name, value in fields.items() if name in self.kinds}
        if self.only_input and (self.only_input in given) == (INSTANCES in fields):
            raise MissingField(f'Send exactly one of the fields "{self.only_input}" and "instances". {self.accepted}')
        if given and INSTANCES in fields:
            raise MissingField(f'Send either "instances" or the fields of one sample, not both. {self.accepted}')
        given_options = {name: value for name, value in fields.items() if name in self.option_types}
        if query:
            if twice := given_options.keys() & query.keys():
                raise RepeatedField(f"The option {quote(min(twice))} is in the query and in the body; send it once.")
            given_options = {**query, **given_options}
        options = self.read_options(given_options)
        if INSTANCES not in fields and not repeated:
            return Request([self.read_inputs(given, form)], options)
        if isinstance(options, PictureOptions) and options.format != "json":
            raise InvalidOption(f"The answer to several inputs is JSON. Send one input to get {options.format}.")
        if repeated:
            [name] = repeated
            values = self.limited(fields[name])
            return Request([self.read_inputs({name: value}, form) for value in values], options, many=True)
        instances = fields[INSTANCES]
        if isinstance(instances, (bytes, bytearray)) or (form and isinstance(instances, str)):
            instances = self.parse_json(instances)
        if not isinstance(instances, list) or not instances:
            raise UnsupportedInput(f'"instances" must be a list of at least one input. {self.accepted}')
        return Request([self.read_instance(instance) for instance in self.limited(instances)], options, many=True)

    def limited(self, instances: list) -> list:
        self.check_instances(len(instances))
        return instances

    def check_instances(self, count: int) -> None:
        if count > self.max_instances:
            raise TooManyInstances(
                f"The request has {count} instances; at most {self.max_instances} are accepted. Send several requests."
            )

    def read_instance(self, instance: object) -> Inputs:
        """Read an object of the inputs' fields or, where there is only one field, its value."""
        if isinstance(instance, dict) and (self.only_input is None or instance.keys() == self.kinds.keys()):
            if unknown := [name for name in instance if name not in self.kinds]:
                raise UnknownField(f"Unknown field {quote(unknown[0])} in an instance. {self.accepted}")
            return self.read_inputs(instance)
        if self.only_input is None:
            raise UnsupportedInput(f"An instance must be an object with the fields {', '.join(self.kinds)}.")
        if isinstance(instance, dict) and self.kinds[self.only_input] and instance.keys() != {B64}:
            raise UnknownField(f'An instance must be an input, or an object with the one field "{self.only_input}".')
        return self.read_inputs({self.only_input: instance})

    def read_inputs(self, given: Mapping, form: bool = False) -> Inputs:
        """Read the inputs of one sample; `form` says that the values are the text of form fields."""
        values = {name: self.read_value(name, value, form) for name, value in given.items()}
        try:
            return self.validate(values)
        except ValidationError as exc:
            error = exc.errors(include_url=False)[0]
            if error["type"] == "missing" and len(error["loc"]) == 1:
                raise MissingField(f'The field "{error["loc"][0]}" is missing. {self.accepted}') from exc
            raise UnsupportedInput(describe_invalid(exc, "inputs")) from exc

    def read_value(self, name: str, value: object, form: bool) -> object:
        if isinstance(value, UnparsedJSON):
            with self.naming(name):
                value = self.parse_json(value)  # which says what is wrong with it
        if isinstance(value, (bytearray, memoryview)):
            value = bytes(value)
        kind = self.kinds[name]
        if kind is None:
            return self.parse_json(value) if isinstance(value, bytes) or (form and isinstance(value, str)) else value
        if value is None and name in self.optional:
            return None
        if isinstance(value, dict) and value.keys() == {B64} and isinstance(value[B64], str):
            with self.naming(name):
                value = binary(value[B64])
        if not isinstance(value, (bytes, str)):
            raise UnsupportedInput(
                f'The input "{name}" must be bytes or a string, not a JSON {json_type(value)}. {self.accepted}'
            )
        if not value:
            raise EmptyInput(f'The input "{name}" is empty. {self.accepted}')
        with self.naming(name):
            return kind.read(value)

    def naming(self, name: str) -> AbstractContextManager[None]:
        """Name the field in the errors of a model of several inputs."""
        return in_field(name) if self.only_input is None else nullcontext()

    def read_options(self, given: Mapping) -> Options:
        if not given:
            return self.defaults
        try:
            return self.options(**{name: self.read_option(name, value) for name, value in given.items()})
        except ValidationError as exc:
            raise InvalidOption(describe_invalid(exc, "options")) from exc

    def read_option(self, name: str, value: object) -> object:
        """Read an option: a JSON value other than null, or the text of a form field."""
        if isinstance(value, (bytes, bytearray)):
            value = value.decode("utf-8", "replace")
        option = self.option_types[name]
        try:
            if isinstance(value, str):
                return option.validate_strings(value, strict=True)
            if value is not None:
                return option.validate_python(value, strict=True)
        except ValidationError:
            pass
        raise InvalidOption(f"{name} must be {describe_option(self.options.model_fields[name])}.")

    def parse_json(self, text: bytes | bytearray | str) -> object:
        try:
            return parse_json(text)
        except RecursionError as exc:
            raise InvalidJSON(f"The request contains invalid JSON. {self.accepted}") from exc
        except ValueError as exc:
            raise InvalidJSON(f"The request contains invalid JSON: {exc}. {self.accepted}") from exc


def check_encoding(sent: RequestHeaders) -> None:
    """Check that the body is not compressed; the frontend has decompressed gzip.

    Raises:
        UnsupportedEncoding: it is.
    """
    if sent.encoding not in ("", "identity"):
        raise UnsupportedEncoding(
            f"The Content-Encoding {quote(sent.encoding)} is not supported. Send the body uncompressed, or "
            "compressed with gzip."
        )


def option_type(field: FieldInfo) -> TypeAdapter:
    annotation: Any = Annotated[field.annotation, field]  # known at run time only
    return TypeAdapter(annotation)


def describe_invalid(error: ValidationError, fields: str) -> str:
    """Return pydantic's first finding, for an error message; one about the whole model has no location."""
    first = error.errors(include_url=False)[0]
    subject = f"{quote('.'.join(map(str, first['loc'])))} is" if first["loc"] else f"The {fields} are"
    return f"{subject} invalid: {first['msg'].removeprefix('Value error, ')}."


def json_type(value: object) -> str:
    names = {dict: "object", list: "array", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


def quote(name: object, limit: int = 40) -> str:
    """Return a name that the client sent, for an error message: shortened, and without control characters."""
    text = str(name)
    return json.dumps(text if len(text) <= limit else text[:limit] + "...", ensure_ascii=False)
