"""Wrap an input into a request: hypothesis draws the shape, `wrap` puts the input into it."""

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar
from urllib.parse import parse_qsl, quote_plus

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trials.fuzz.mutate import generic, tree
from tests.trials.fuzz.parts import FIELD, Part

BOUNDARY = "------------------------fuzz"
JSON_TYPE = "application/json"
CONTENT_TYPES = (
    None, "", "application/octet-stream", JSON_TYPE, "APPLICATION/JSON", f"{JSON_TYPE}; charset=utf-16", "text/plain",
    "text/plain; charset=latin-1", "text/html;;;", "image/png", "audio/wav", "multipart/mixed; boundary=b",
    "application/x-www-form-urlencoded", "*/*", "nonsense", "x" * 4000, "multipart/form-data",
)  # fmt: skip
HEADERS = (
    ("X-Request-Start", "t=1"), ("X-Request-Start", "t=99999999999999"), ("X-Request-Start", "soon"),
    ("describe", "True"), ("explain", "True"), ("Accept", "image/png"), ("Content-Encoding", "gzip"),
    ("X-Name", "caf\u00e9 \u00ff"), ("X-Long", "x" * 7000), ("Cookie", "a=b; " * 100), ("data", "hello"),
    ("Content-Language", ""), ("Range", "bytes=0-1"), ("X-Forwarded-For", "127.0.0.1, ::1"), ("top_k", "1"),
)  # fmt: skip
PATHS = (
    "/predictions/{model}", "/predictions/{model}/1.0", "/predictions/{model}/9.9", "/predictions/{model}/%00",
    "/predictions/{model}?top_k=1&data=x", "/explanations/{model}", "/predictions/no-such-model",
)  # fmt: skip
OPEN_INFERENCE = (  # the same in the Open Inference Protocol
    "/v2/models/{model}/infer", "/v2/models/{model}/versions/1.0/infer", "/v2/models/{model}/versions/9.9/infer",
    "/v2/models/{model}/%00", "/v2/models/{model}/infer?top_k=1&data=x", "/v2/models/{model}/explain",
    "/v2/models/no-such-model/infer",
)  # fmt: skip
JSON_SIZE = "Inference-Header-Content-Length"
FIELDS = ("data", "data", "data", "instances", "top_k", "Data", "", "body", "a" * 300, "data[]", "\u00e9")
BOUNDARIES = ("", "other", BOUNDARY + "-", "x" * 200, "a b", '"unclosed')
SHAPES = (
    *("raw", "raw", "raw", "json", "json", "instances", "multipart", "urlencoded", "base64", "data url"),
    *("v2", "v2 binary"),
)


@dataclass(frozen=True)
class Shape:
    """The form of a request, without its input.

    Attributes:
        kind: one of SHAPES.
        content_type: of a raw body; None: no Content-Type.
        path: with `{model}` for the model's name.
        top_k: a JSON value, or the text in a form; None: no such field.
        field: name of the field with the input; with the usual name, all inputs keep the names of their fields.
        boundary: of a form, as its Content-Type has it; None: it has none.
        chunked: whether the body is sent without a length.
        json_size: the header of binary tensors; None: the right number.
        changes: number of mutations of the JSON tree, and of the finished body.
        seed: of these mutations.
    """

    kind: str
    content_type: str | None
    path: str
    method: str
    headers: tuple[tuple[str, str], ...]
    top_k: object
    field: str
    boundary: str | None
    chunked: bool
    json_size: str | None
    changes: tuple[int, int]
    seed: int

    def path_of(self, model: str) -> str:
        path = OPEN_INFERENCE[PATHS.index(self.path)] if self.kind in ("v2", "v2 binary") else self.path
        return path.format(model=model)


@dataclass(frozen=True)
class Wrapped:
    """A finished request.

    Attributes:
        headers: the Content-Type among them.
        body: the body as sent.
        row: the row that TorchServe's worker makes of it; None if this depends on the frontend.
    """

    headers: tuple[tuple[str, str], ...]
    body: bytes
    row: dict | None = field(default=None, compare=False)


top_ks = st.one_of(
    st.integers(1, 200),
    st.integers(),
    st.sampled_from([0, 3, 10, 11, 151, 152, -1, 2**63, True, "3", " 3", "3.0", "\u0663", "", [], {}, None, 1.5]),
    st.text(max_size=30),
    st.floats(),
)


def mostly(usual: object, others: st.SearchStrategy) -> st.SearchStrategy:
    """Draw the usual value nine times out of ten.

    With more unusual values in one request, it would be rejected before its input is decoded.
    """
    return st.integers(0, 9).flatmap(lambda die: others if die == 9 else st.just(usual))


shapes = st.builds(
    Shape,
    kind=st.sampled_from(SHAPES),
    content_type=mostly(None, st.sampled_from(CONTENT_TYPES)),
    path=mostly(PATHS[0], st.sampled_from(PATHS)),
    method=mostly("POST", st.sampled_from(["POST", "PUT", "PATCH", "GET", "DELETE"])),
    headers=mostly((), st.lists(st.sampled_from(HEADERS), max_size=4).map(tuple)),
    top_k=mostly(None, top_ks),
    field=mostly(FIELD, st.sampled_from(FIELDS)),
    boundary=mostly(BOUNDARY, st.sampled_from((None, *BOUNDARIES))),
    chunked=mostly(False, st.booleans()),
    json_size=mostly(None, st.sampled_from(["0", "1", "-1", "", "x", "9" * 5000, "\u0663"])),
    changes=mostly((0, 0), st.tuples(st.integers(0, 3), st.integers(0, 1))),
    seed=st.integers(0, 2**32 - 1),
)

T = TypeVar("T")
ENTROPY = 4096  # bytes for drawing a shape, more than it needs


def drawing(strategy: st.SearchStrategy[T]) -> Callable[[Random], T]:
    """Return a function that draws from a strategy with a seeded generator, by hypothesis's API for fuzzers."""
    found: list[T] = []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def keep(value: T) -> None:
        found.append(value)

    def draw(random: Random) -> T:
        found.clear()
        while not found:  # from a few byte strings, the strategy draws nothing
            keep.hypothesis.fuzz_one_input(random.randbytes(ENTROPY))
        return found[0]

    return draw


def wrap(shape: Shape, inputs: list[Part], several: bool) -> Wrapped:
    """Put inputs into a request of this shape.

    Args:
        shape: of the request.
        inputs: one, or any number of them if the model takes several.
        several: whether it does. Such a model takes no raw body: the request is a form instead.
    """
    random = Random(shape.seed)
    more: tuple[tuple[str, str], ...] = ()
    if shape.field != FIELD:
        inputs = [replace(part, field=shape.field) if index == 0 else part for index, part in enumerate(inputs)]
    kind = "multipart" if several and shape.kind in ("raw", "base64") else shape.kind
    if kind in ("json", "instances", "data url"):
        content_type, body = JSON_TYPE, as_json(shape, inputs, several, random)
    elif kind in ("v2", "v2 binary"):
        document, binary = open_inference(shape, inputs, random)
        content_type, body = JSON_TYPE, document + binary
        if kind == "v2 binary":  # the frontend then sets this Content-Type
            more = ((JSON_SIZE, str(len(document)) if shape.json_size is None else shape.json_size),)
            content_type = "application/octet-stream"
    elif kind == "base64":
        content_type, body = "text/plain", base64.encodebytes(inputs[0].content)
    elif kind == "multipart":
        boundary = "" if shape.boundary is None else f"; boundary={shape.boundary}"
        content_type, body = f"multipart/form-data{boundary}", multipart(shape, inputs)
    elif kind == "urlencoded":
        content_type, body = "application/x-www-form-urlencoded", urlencoded(shape, inputs)
    else:
        content_type, body = shape.content_type, inputs[0].content
    damaged = body
    for _ in range(shape.changes[1]):
        damaged = generic.mutated(damaged, [body], random)
    headers = (*(() if content_type is None else (("Content-Type", content_type),)), *more, *shape.headers)
    return Wrapped(headers, damaged, row(shape, kind, inputs, content_type, damaged, intact=damaged == body))


def as_json(shape: Shape, inputs: list[Part], several: bool, random: Random) -> bytes:
    pairs = tuple((part.field, in_json(part, shape.kind == "data url")) for part in inputs)
    if shape.kind == "instances":
        objects = [tree.Object(pairs)] * 2 if several else [pairs[0][1], tree.Object(pairs)]
        pairs = (("instances", objects[: 1 + shape.seed % 2]),)
    return written(tree.Object((*pairs, *option(shape))), shape, random)


def option(shape: Shape) -> tuple[tuple[str, object], ...]:
    return () if shape.top_k is None else (("top_k", tree.build(shape.top_k)),)


def written(node: object, shape: Shape, random: Random) -> bytes:
    for _ in range(shape.changes[0]):
        node = tree.mutated(node, random)
    return tree.write(node).encode("utf-8", "surrogatepass")


def open_inference(shape: Shape, inputs: list[Part], random: Random) -> tuple[bytes, bytes]:
    """Return the JSON of a request of the Open Inference Protocol with one sample, and its binary tensors."""
    tensors, contents = [], []
    for part in inputs:
        described = {"name": part.field, "shape": [1], "datatype": "BYTES"}
        if shape.kind == "v2 binary":
            contents.append(struct.pack("<I", len(part.content)) + part.content)
            described["parameters"] = {"binary_data_size": len(contents[-1])}
        elif part.kind == "file":
            described |= {"data": [in_json(part, False)], "parameters": {"content_type": "base64"}}
        else:
            described["data"] = [part.content.decode("utf-8", "replace")]
        tensors.append(tree.build(described))
    parameters = (("parameters", tree.Object(option(shape))),) if option(shape) else ()
    return written(tree.Object((("inputs", tensors), *parameters)), shape, random), b"".join(contents)


def in_json(part: Part, as_url: bool) -> object:
    """Return a part as a node of a JSON tree."""
    if as_url or part.kind == "file":
        head = "data:application/octet-stream;base64," if as_url else ""
        return head + base64.b64encode(part.content).decode()
    text = part.content.decode("utf-8", "replace")
    return text if part.kind == "text" else tree.Verbatim(text)


def form(shape: Shape, inputs: list[Part]) -> list[tuple[str, bytes]]:
    top_k = [] if shape.top_k is None else [("top_k", str(shape.top_k).encode("utf-8", "surrogatepass"))]
    return [*((part.field, part.content) for part in inputs), *top_k]


def multipart(shape: Shape, inputs: list[Part]) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="file"\r\n\r\n'.encode() + value
        for name, value in form(shape, inputs)
    ]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def urlencoded(shape: Shape, inputs: list[Part]) -> bytes:
    return "&".join(f"{quote_plus(name)}={quote_plus(value)}" for name, value in form(shape, inputs)).encode()


def row(
    shape: Shape, kind: str, inputs: list[Part], content_type: str | None, body: bytes, intact: bool
) -> dict | None:
    """Return the row that `ts.protocol.otf_message_handler` would pass to the handler, or None if it is unknown."""
    if kind == "multipart":
        return dict(form(shape, inputs)) if intact and shape.boundary == BOUNDARY else None
    if content_type == "application/x-www-form-urlencoded":
        return dict(parse_qsl(body.decode("latin-1"), True)) if intact and kind == "urlencoded" else None
    if content_type == "multipart/form-data":
        return None
    value: object = body
    try:
        if content_type == JSON_TYPE:
            value = json.loads(body.decode())
        elif content_type and content_type.startswith("text"):
            value = body.decode()
    except (ValueError, RecursionError):
        pass
    return {"body": value}
