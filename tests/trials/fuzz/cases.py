"""Generate case number N of a seed: a mutated input in a request of a random shape. The same N gives the same case."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.trials.fuzz import parts
from tests.trials.fuzz.corpus import corpus, headers
from tests.trials.fuzz.shapes import drawing, shapes, wrap

UNDAMAGED = 0.1  # share of cases with an unchanged input of the corpus: only their shape is unusual
AT_THE_BODY_LIMIT = 0.004  # share of cases that are padded to the largest body, or to one byte more
BODY_LIMIT = 16 << 20
SHARES = {"cells": 1, "membrane": 1}  # of a turn's cases: these models compute longer
USUAL_SHARE = 6
draw_shape = drawing(shapes)


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        origin: how it was generated, as text.
        row: see `Wrapped.row`.
    """

    seed: int
    number: int
    model: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    chunked: bool
    origin: str
    row: dict | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return f"{self.model}-{self.seed}-{self.number}"

    @property
    def open_inference(self) -> bool:
        return self.path.startswith("/v2/")

    @property
    def content_type(self) -> str:
        return next((value for name, value in self.headers if name == "Content-Type"), "")

    def curl(self, base: str, file: Path) -> str:
        """Return the curl command that sends the same request.

        Args:
            base: URL of the server.
            file: contains the body.
        """
        # for curl, `NAME;` is a header with an empty value, and `NAME:` removes one of its default headers
        headers = [f"{name}: {value}" if value else f"{name};" for name, value in self.headers]
        headers += [f"{name}:" for name in ("Expect", "Content-Type") if name not in dict(self.headers)]
        if self.chunked:
            headers.append("Transfer-Encoding: chunked")
        arguments = [part for header in headers for part in ("-H", header)]
        return shlex.join(["curl", "-g", "-X", self.method, *arguments, "--data-binary", f"@{file}", base + self.path])


def model_of(number: int, models: tuple[str, ...]) -> str:
    """Return the model of a case: the models take turns by the case's number."""
    turns = [model for model in models for _ in range(SHARES.get(model, USUAL_SHARE))]
    return turns[number % len(turns)]


def case(seed: int, number: int, models: tuple[str, ...]) -> Case:
    """Generate a case.

    Args:
        seed: of the run.
        number: of the case.
        models: of the run.
    """
    model = model_of(number, models)
    random = Random(f"{seed} {number} {model}")
    files = corpus(model)
    name = random.choice(list(files))
    several = len(parts.kinds(model)) > 1
    inputs = parts.split(model, files[name], in_json=bool(headers(model)))
    damaged = random.random() >= UNDAMAGED
    if damaged:
        inputs = parts.damaged(inputs, list(files.values()), several, random)
    shape = draw_shape(random)
    wrapped = wrap(shape, inputs, several)
    body, row = wrapped.body, wrapped.row
    if random.random() < AT_THE_BODY_LIMIT:
        body, row = body.ljust(BODY_LIMIT + random.randint(0, 1), b" "), None
    return Case(
        seed=seed,
        number=number,
        model=model,
        method=shape.method,
        path=shape.path_of(model),
        headers=wrapped.headers,
        body=body,
        chunked=shape.chunked,
        origin=f"{name}{', damaged' if damaged else ''}, as {shape.kind}",
        row=row,
    )
