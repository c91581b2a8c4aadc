"""Requests and answers of the Open Inference Protocol (v2), as clients of KServe and Triton send and read them.

A request has named tensors. A file, a text or JSON is one element of a tensor of BYTES, and each element is a sample.
Where a handler is also `TakesTensors`, a client may send the module's own tensors instead, and nothing is decoded.
The answers are tensors, too (`tensor_answers.py`).

The frontend's agent marks these requests with a header. They run in the same batches as all others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from handlers.core import tensor_data
from handlers.core.declared import JSON, PICTURE, TensorInput, columns, tensor_inputs
from handlers.core.errors import (
    EmptyInput,
    InvalidJSON,
    InvalidOption,
    MissingField,
    RepeatedField,
    UnknownField,
    UnsupportedInput,
)
from handlers.core.headers import Verb, header, request_headers
from handlers.core.inputs import Options as HandlerOptions
from handlers.core.inputs import decode_base64
from handlers.core.request import BODY, Request, RequestReader, check_encoding, describe_invalid, json_type, quote
from handlers.core.slots import Sample
from handlers.core.strict_json import parse_json
from handlers.core.tensor_answers import BASE64, Respond
from handlers.core.tensor_data import BYTES, DATATYPES, Values

PROTOCOL = "bundle-protocol"  # the header that the frontend's agent sets
JSON_SIZE = "Inference-Header-Content-Length"  # bytes of JSON, before the binary tensors
MAX_DIMENSIONS = 8
MAX_ID = 256  # characters: the answer repeats it, and one that is too long ends the worker
# what clients send beside the options: for sequences, schedulers and codecs that are not here
IGNORED = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "content_type", "headers"}
BINARY_OUTPUT = "binary_data_output"
NO_SAMPLES = "The inputs have no elements. Send at least one sample."


@dataclass(frozen=True)
class Prepared:
    """The tensors of a sample that a client has preprocessed. Iterates over names and contents, as `Inputs` do."""

    tensors: dict[str, Tensor]

    def __iter__(self):
        return ((name, tensor.numpy().tobytes()) for name, tensor in self.tensors.items())

    def sample(self) -> Sample:
        tensors = tuple(self.tensors.values())
        return Sample(tensors if len(tensors) > 1 else tensors[0])


Parameters = Annotated[dict[str, Any], BeforeValidator(lambda sent: {} if sent is None else sent)]  # null is nothing


class Part(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    parameters: Parameters = {}


class Input(Part):
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 63)]], Field(min_length=1, max_length=MAX_DIMENSIONS)]
    datatype: str
    data: list | None = None


class Document(BaseModel):
    """The JSON of a request. Other names, such as model_name, are ignored."""

    model_config = ConfigDict(strict=True)

    id: Annotated[str, Field(max_length=MAX_ID)] | None = None
    parameters: Parameters = {}
    inputs: Annotated[list[Input], Field(min_length=1, max_length=100)]
    outputs: Annotated[list[Part], Field(max_length=100)] | None = None


class Given(NamedTuple):
    """An input that a client sent, with its elements."""

    sent: Input
    values: Values


class OpenInferenceReader(RequestReader):
    """Read requests of the Open Inference Protocol for one verb of a handler.

    Args:
        handler: the `BatchHandler`.
        options: the options of the verb.
        explains: whether the verb is explain: its answers have no columns, and it needs inputs that it can draw.
    """

    def __init__(self, handler: Any, options: type[HandlerOptions], explains: bool):
        self.handler = handler
        self.columns = () if explains else columns(handler)
        self.tensors = {} if explains else {each.name: each for each in tensor_inputs(handler)}
        if both := self.tensors.keys() & handler.Inputs.model_fields.keys():
            raise TypeError(
                f"{type(handler).__name__}: {min(both)} is the name of a field and of a tensor. Rename one."
            )
        super().__init__(handler.Inputs, options, handler.settings.max_instances)

    def describe_accepted(self) -> str:
        fields = " and ".join(f'"{name}" (BYTES)' for name in self.kinds)
        prepared = " and ".join(f'"{each.name}" ({each.datatype})' for each in self.tensors.values())
        options = ", ".join(f'"{name}"' for name in self.option_types)
        accepted = f"Accepted inputs: {fields}" + (f", or {prepared}" if prepared else "")
        return accepted + (f"; accepted parameters: {options}." if options else ".")

    def read(self, row: Mapping, headers: Mapping) -> Request:
        sent = request_headers(headers)
        check_encoding(sent)
        if row.keys() != {BODY}:
            raise UnsupportedInput("The body must be JSON of the Open Inference Protocol, not a form.")
        document, given = self.read_tensors(row[BODY], header(headers, JSON_SIZE.lower()))
        options = self.read_parameters(document.parameters, self.read_query(sent.query))
        inputs = self.read_samples(given) if given.keys().isdisjoint(self.tensors) else self.read_prepared(given)
        context = self.handler.context
        version = context.manifest["model"]["modelVersion"]
        outputs = self.read_outputs(document, options)
        respond = Respond(context.model_name, str(version), document.id, outputs, self.columns)
        return Request(inputs, options, respond=respond)

    def read_tensors(self, body: object, size: str) -> tuple[Document, dict[str, Given]]:
        """Read the JSON, and the binary tensors after it.

        Args:
            body: the request's body; TorchServe may have parsed it.
            size: the header that says how long the JSON is; "" if the whole body is JSON.
        """
        if isinstance(body, str):  # of a client that calls it a text
            body = body.encode(errors="surrogatepass")
        content = memoryview(body) if isinstance(body, (bytes, bytearray)) else memoryview(b"")
        end = len(content)
        if size:
            # a number of more digits than a body can have bytes would take long to read
            end = int(size) if size.isascii() and size.isdecimal() and len(size) < 16 else -1
            if not 0 <= end <= len(content):
                raise UnsupportedInput(f"{JSON_SIZE} must be a number of bytes, at most those of the body.")
            if not end:
                return self.read_raw(bytes(content))
        parsed = self.parse_json(bytes(content[:end])) if isinstance(body, (bytes, bytearray)) else body
        if not isinstance(parsed, dict):
            raise UnsupportedInput(f'The request must be an object with "inputs", not a JSON {json_type(parsed)}.')
        try:
            document = Document.model_validate(parsed)
        except ValidationError as exc:
            raise UnsupportedInput(describe_invalid(exc, "request")) from exc
        binary, given = content[end:], {}
        for each in document.inputs:
            if each.name in given:
                raise RepeatedField(f"The input {quote(each.name)} is sent twice.")
            if each.name not in self.kinds and each.name not in self.tensors:
                raise UnknownField(f"Unknown input {quote(each.name)}. {self.accepted}")
            if each.datatype == BYTES:  # before the elements are read: a body of 16 MiB can have millions
                self.check_instances(math.prod(each.shape))
            values, used = read_values(each, binary)
            given[each.name] = Given(each, values)
            binary = binary[used:]
        if len(binary):
            raise UnsupportedInput(f"The body has {len(binary)} bytes more than its JSON and its binary tensors.")
        return document, given

    def read_raw(self, content: bytes) -> tuple[Document, dict[str, Given]]:
        """Read a body without JSON: the only input of one sample, whose outputs are all sent as binary tensors."""
        if self.only_input is None:
            raise UnsupportedInput(f"The model has several inputs, so {JSON_SIZE} must not be 0. {self.accepted}")
        only = Input(name=self.only_input, shape=[1], datatype=BYTES)
        return Document(inputs=[only], parameters={BINARY_OUTPUT: True}), {only.name: Given(only, [content])}

    def read_samples(self, given: dict[str, Given]) -> list:
        """Read files, texts and JSON: one sample for each element."""
        sent = {name: elements(*each) for name, each in given.items()}
        same_count({name: len(each) for name, each in sent.items()})
        samples = self.limited(list(zip(*sent.values(), strict=True)))
        return [self.read_inputs(dict(zip(sent, each, strict=True)), form=True) for each in samples]

    def read_prepared(self, given: dict[str, Given]) -> list:
        """Read the module's own tensors: one sample for each entry of the first dimension."""
        if missing := [name for name in self.tensors if name not in given]:
            raise MissingField(f"The input {quote(missing[0])} is missing. {self.accepted}")
        if files := [name for name in given if name not in self.tensors]:
            raise UnsupportedInput(f"The input {quote(files[0])} must not be sent beside tensors. {self.accepted}")
        batches = {name: prepared(self.tensors[name], *given[name]) for name in self.tensors}
        same_count({name: len(batch) for name, batch in batches.items()})
        self.check_instances(max(map(len, batches.values())))  # before each row becomes a tensor of its own
        rows = zip(*batches.values(), strict=True)
        samples = [Prepared(dict(zip(batches, row, strict=True))) for row in rows]
        for each in samples:
            self.handler.check_tensors(tuple(each.tensors.values()))
        return samples

    def read_parameters(self, parameters: Mapping, query: Mapping) -> HandlerOptions:
        given = {name: value for name, value in parameters.items() if name not in IGNORED | {BINARY_OUTPUT}}
        if unknown := [name for name in given if name not in self.option_types]:
            raise UnknownField(f"Unknown parameter {quote(unknown[0])}. {self.accepted}")
        if twice := given.keys() & query.keys():
            raise RepeatedField(f"The option {quote(min(twice))} is in the query and in the parameters; send it once.")
        return self.read_options({**query, **given})

    def read_outputs(self, document: Document, options: HandlerOptions) -> tuple[tuple[str, bool], ...]:
        """Return the names of the outputs, and whether each is binary."""
        names = [PICTURE] if getattr(options, "format", JSON) == "png" else [*(c.name for c in self.columns), JSON]
        binary = document.parameters.get(BINARY_OUTPUT, False)
        asked: dict[str, Any] = {}
        for each in document.outputs or ():
            if each.name in asked:
                raise RepeatedField(f"The output {quote(each.name)} is asked for twice.")
            if each.name not in names:
                accepted = ", ".join(f'"{name}"' for name in names)
                raise UnknownField(f"Unknown output {quote(each.name)}. Accepted with these parameters: {accepted}.")
            if unknown := each.parameters.keys() - {"binary_data", "content_type"}:
                raise UnknownField(f"The parameter {quote(min(unknown))} of an output is not supported.")
            asked[each.name] = each.parameters.get("binary_data", binary)
        if not asked:
            asked = dict.fromkeys(names, binary)
        if not all(isinstance(each, bool) for each in [binary, *asked.values()]):
            raise InvalidOption("binary_data and binary_data_output must be true or false.")
        return tuple(asked.items())

    def parse_json(self, text: bytes | bytearray | str) -> object:
        try:
            return parse_json(text)
        except RecursionError as exc:
            raise InvalidJSON("The request contains invalid JSON.") from exc
        except ValueError as exc:
            raise InvalidJSON(f"The request contains invalid JSON: {exc}.") from exc


def read_values(sent: Input, binary: memoryview) -> tuple[Values, int]:
    """Return the elements of an input, and how many bytes of the binary tensors they took."""
    name = sent.name
    if sent.datatype not in DATATYPES:
        accepted = ", ".join(DATATYPES)
        raise UnsupportedInput(f'The datatype of "{name}" must be one of {accepted}, not {quote(sent.datatype)}.')
    if unknown := sent.parameters.keys() - {"binary_data_size", "content_type"}:
        raise UnknownField(f"The parameter {quote(min(unknown))} of an input is not supported.")
    size = sent.parameters.get("binary_data_size")
    if (size is None) == (sent.data is None):
        raise MissingField(f'Send the elements of "{name}" either as "data" or as a binary tensor.')
    if sent.data is not None:
        return tensor_data.from_json(name, sent.datatype, sent.shape, sent.data), 0
    if type(size) is not int or not 0 <= size <= len(binary):
        raise UnsupportedInput(
            f'binary_data_size of "{name}" must be a number of bytes, at most those that follow the JSON. '
            f"The header {JSON_SIZE} says how long the JSON is."
        )
    return tensor_data.from_binary(name, sent.datatype, sent.shape, binary[:size]), size


def elements(sent: Input, values: Values) -> Sequence[bytes | str]:
    """Return the files or texts of an input, one for each sample."""
    if not isinstance(values, list):
        raise UnsupportedInput(f'The datatype of "{sent.name}" must be BYTES, not {sent.datatype}.')
    if sent.shape[0] != len(values):
        raise UnsupportedInput(f'The shape of "{sent.name}" must be [N] or [N, 1], with one element for each sample.')
    content_type = sent.parameters.get("content_type", "str")
    if content_type == BASE64:
        encoded = (each.encode("ascii", "replace") if isinstance(each, str) else each for each in values)
        return [decode_base64(each) for each in encoded]
    if content_type != "str":
        raise InvalidOption(f'The content_type of "{sent.name}" must be "base64" or "str".')
    return values


def prepared(declared: TensorInput, sent: Input, values: Values) -> Tensor:
    """Return a batch of the module's tensors, [N, ...]."""
    expected = ["N", *("any" if size < 0 else size for size in declared.shape)]
    fits = len(sent.shape) == len(expected) and all(
        size == wanted or (wanted < 0 and size) for size, wanted in zip(sent.shape[1:], declared.shape, strict=True)
    )
    if sent.datatype != declared.datatype or not fits:
        shape = ", ".join(map(str, expected))
        raise UnsupportedInput(
            f'The input "{declared.name}" must be {declared.datatype} [{shape}], not {sent.datatype} {sent.shape}.'
        )
    if not sent.shape[0]:  # NumPy has no array of the shape [0, 2**62]
        raise EmptyInput(NO_SAMPLES)
    return torch.from_numpy(numpy.asarray(values).reshape(sent.shape))


def same_count(counts: dict[str, int]) -> None:
    """Check that all inputs have the same number of samples.

    Raises:
        UnsupportedInput: the numbers differ.
        EmptyInput: it is 0.
    """
    if len(set(counts.values())) > 1:
        listed = ", ".join(f'"{name}" has {count}' for name, count in counts.items())
        raise UnsupportedInput(f"The inputs differ in their first dimension, the number of samples: {listed}.")
    if not any(counts.values()):
        raise EmptyInput(NO_SAMPLES)


def is_open_inference(headers: Mapping) -> bool:
    """Return whether the frontend's agent marked a request. It replaces a client's own header of this name."""
    return headers.get(PROTOCOL) == "v2"


def readers(handler: Any) -> dict[tuple[Verb, bool], RequestReader]:
    """Return the readers of a handler, by verb and by whether the client speaks the Open Inference Protocol."""
    found: dict[tuple[Verb, bool], RequestReader] = {}
    for verb, options in ((Verb.PREDICT, handler.Options), (Verb.EXPLAIN, handler.ExplainOptions or handler.Options)):
        found[verb, False] = RequestReader(handler.Inputs, options, handler.settings.max_instances)
        found[verb, True] = OpenInferenceReader(handler, options, explains=verb is Verb.EXPLAIN)
    return found
