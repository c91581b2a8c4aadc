"""Mutate files with knowledge of their format. The same file and the same `Random` give the same result.

The mutators of a format split a file, change its parts and join them again, so that the result passes a decoder's first
checks. A mutator never raises: a file of another format gets a generic mutation.
"""

from collections.abc import Callable
from random import Random
from typing import Literal

from tests.trials.fuzz.mutate import generic, graph, jpeg, png, riff, streams, text

Kind = Literal["file", "text", "graph"]

MOST = 4  # changes to one file
LARGEST = 2 << 20  # bytes of the result: repeated blocks can be repeated again
STRUCTURAL = 0.65  # share of changes by the format's own mutator, if it has one
STRUCTURAL_GRAPH = 0.95  # after most other changes of JSON, it cannot be parsed

FORMATS = (
    (b"\x89PNG\r\n\x1a\n", png.mutated),
    (b"\xff\xd8", jpeg.mutated),
    (b"RIFF", riff.mutated),
    (b"RF64", riff.mutated),
    (b"OggS", streams.ogg),
    (b"fLaC", streams.flac),
)


def mutated(content: bytes, others: list[bytes], random: Random, kind: Kind = "file") -> bytes:
    """Mutate an input.

    Args:
        content: of the input.
        others: inputs from which parts may be copied.
        random: determines the mutation.
        kind: of the input. That of a file is recognised by its first bytes.
    """
    for _ in range(random.randint(1, MOST)):
        structural = mutator(content, kind)
        if structural and random.random() < (STRUCTURAL_GRAPH if kind == "graph" else STRUCTURAL):
            content = structural(content, random)
        else:
            content = generic.mutated(content, others, random)
        content = content[:LARGEST]
    return content


def mutator(content: bytes, kind: Kind) -> Callable[[bytes, Random], bytes] | None:
    """Return the mutator that knows the input's format, if there is one."""
    if kind == "file":
        return next((by for magic, by in FORMATS if content.startswith(magic)), None)
    return text.mutated if kind == "text" else graph.mutated
