"""Mutate files with knowledge of their format. The same file and the same `Random` give the same result.

The mutators of a format split a file, change its parts and join them again, so that the result passes a decoder's first
checks. A mutator never raises: a file of another format gets a generic mutation.
"""

from random import Random

from tests.trials.fuzz.mutate import generic, jpeg, png, riff, streams, text

MOST = 4  # changes to one file
LARGEST = 2 << 20  # bytes of the result: repeated blocks can be repeated again
STRUCTURAL = 0.65  # share of changes by the format's own mutator, if it has one

FORMATS = (
    (b"\x89PNG\r\n\x1a\n", png.mutated),
    (b"\xff\xd8", jpeg.mutated),
    (b"RIFF", riff.mutated),
    (b"RF64", riff.mutated),
    (b"OggS", streams.ogg),
    (b"fLaC", streams.flac),
)


def mutated(content: bytes, others: list[bytes], random: Random, is_text: bool = False) -> bytes:
    """Mutate a file.

    Args:
        content: of the file.
        others: files from which parts may be copied.
        random: determines the mutation.
        is_text: whether to treat the file as text.
    """
    for _ in range(random.randint(1, MOST)):
        structural = text.mutated if is_text else next((by for magic, by in FORMATS if content.startswith(magic)), None)
        if structural and random.random() < STRUCTURAL:
            content = structural(content, random)
        else:
            content = generic.mutated(content, others, random)
        content = content[:LARGEST]
    return content
