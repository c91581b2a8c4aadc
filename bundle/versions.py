"""Compare the versions of models: 1.10 is later than 1.9, 1.0 than 1.0-rc1, v2 than v1, 2024-02-01 than 2024-01-31."""

import re

VERSION = r"[A-Za-z0-9][A-Za-z0-9._\-]*"  # what URLs, file names and the proxy's routes can hold
RELEASE = re.compile(r"v?(\d+(?:[._\-]\d+)*)(.*)")
HASH = re.compile(r"(?=.*[a-f])(?=.*\d)[0-9a-f]{7,64}")  # of a commit; it may begin with a digit
# words of what comes before a release, in their order
EARLY = {
    "dev": 0,
    "snapshot": 0,
    "a": 1,
    "alpha": 1,
    "b": 2,
    "beta": 2,
    "m": 3,
    "c": 4,
    "pre": 4,
    "preview": 4,
    "rc": 4,
}


def is_older(version: str, other: str) -> bool:
    """Return whether a version is older than another one; False if one is a word or a hash, which have no order."""
    first, second = key(version), key(other)
    return first is not None and second is not None and first < second


def key(version: str) -> tuple | None:
    """Return what versions are sorted by; None for a word or a hash."""
    found = RELEASE.fullmatch(version.lower())
    if not found or HASH.fullmatch(version):
        return None
    numbers = [int(part) for part in re.split(r"[._\-]", found[1])]
    while numbers and not numbers[-1]:
        numbers.pop()  # 1.0 is 1
    return tuple(numbers), tuple(map(rank, [*re.findall(r"\d+|[a-z]+", found[2]), ""]))


def rank(part: str) -> tuple[int, int, str]:
    """Return the rank of a part behind the number: words of early versions, then nothing, other words, numbers."""
    if part.isdigit():
        return 3, int(part), ""
    if part in EARLY:
        return 0, EARLY[part], ""
    return 2 if part else 1, 0, part
