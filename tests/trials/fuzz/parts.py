"""The parts of a request: its inputs, each with the name of its field."""

import json
from dataclasses import dataclass, replace
from random import Random

from bundle.samples import form_fields
from tests.trials.fuzz.mutate import Kind, mutated

FIELD = "data"  # of a model's only input
KINDS: dict[str, dict[str, Kind]] = {
    "text": {FIELD: "text"},
    "molecule": {FIELD: "graph"},
    "avdigits": {"image": "file", "text": "text", "audio": "file"},
}  # of the fields of each model; other models take one file


@dataclass(frozen=True)
class Part:
    """One input.

    Attributes:
        field: the name of its field.
        content: as the field of a form has it.
        kind: how it is mutated, and written in JSON: a file in base64, a text as a string, a graph as it is.
    """

    field: str
    content: bytes
    kind: Kind = "file"


def kinds(model: str) -> dict[str, Kind]:
    return KINDS.get(model, {FIELD: "file"})


def split(model: str, body: bytes, in_json: bool) -> list[Part]:
    """Return the parts of an input of the corpus: a raw body, or a JSON object with the model's fields."""
    if not in_json:
        return [Part(FIELD, body, kinds(model)[FIELD])]
    return [Part(name, content, kinds(model)[name]) for name, content in form_fields(json.loads(body)).items()]


def damaged(parts: list[Part], others: list[bytes], several: bool, random: Random) -> list[Part]:
    """Mutate one or more parts. Where a model takes several, parts may also be missing, repeated, empty or swapped.

    Args:
        parts: of the request; perhaps none.
        others: inputs from which contents may be copied.
        several: whether the model takes several inputs.
        random: determines the mutation.
    """
    change = random.choice(("mutate", "mutate", "mutate", *CHANGES)) if several and parts else "mutate"
    if change == "mutate":
        chosen = random.sample(range(len(parts)), random.randint(min(1, len(parts)), len(parts)))
        return [
            replace(part, content=mutated(part.content, others, random, part.kind)) if index in chosen else part
            for index, part in enumerate(parts)
        ]
    at = random.randrange(len(parts))
    before, part, after = parts[:at], parts[at], parts[at + 1 :]
    if change == "remove":
        return before + after
    if change == "repeat":
        other = replace(part, content=mutated(part.content, others, random, part.kind))
        return [*before, *random.sample([part, other], 2), *after, *[part] * random.choice((0, 0, 100))]
    if change == "empty":
        return [*before, replace(part, content=b""), *after]
    if change == "cut":
        return [*before, replace(part, content=part.content[: random.randint(0, len(part.content))]), *after]
    contents = random.sample([each.content for each in parts], len(parts))  # "swap"
    return [replace(each, content=content) for each, content in zip(parts, contents, strict=True)]


CHANGES = ("remove", "repeat", "empty", "cut", "swap")
