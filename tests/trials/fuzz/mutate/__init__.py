"""Damage that knows what it damages: `mutated` takes a file and returns another one, the same for the same `Random`.

A format's own mutators take its file apart, change its parts, and put it together again, so that what they change gets
past the first check of a decoder. None of them raises, whatever it is given: a file that is not of its format gets
generic damage.
"""

from random import Random

from tests.trials.fuzz.mutate import generic, jpeg, png, riff, streams, text

MOST = 4  # changes to one file
LARGEST = 2 << 20  # bytes of what comes out: blocks repeat, and their repetitions repeat
STRUCTURAL = 0.65  # share of changes that know the format, where it has a mutator

FORMATS = (
    (b"\x89PNG\r\n\x1a\n", png.mutated),
    (b"\xff\xd8", jpeg.mutated),
    (b"RIFF", riff.mutated),
    (b"RF64", riff.mutated),
    (b"OggS", streams.ogg),
    (b"fLaC", streams.flac),
)


def mutated(content: bytes, others: list[bytes], random: Random, is_text: bool = False) -> bytes:
    """
    Args:
        others: files that parts may be taken from.
        is_text: whether Unicode may be put in.
    """
    for _ in range(random.randint(1, MOST)):
        structural = text.mutated if is_text else next((by for magic, by in FORMATS if content.startswith(magic)), None)
        if structural and random.random() < STRUCTURAL:
            content = structural(content, random)
        else:
            content = generic.mutated(content, others, random)
        content = content[:LARGEST]
    return content
