"""Digests of named parts, such as files and settings, by which a later command finds out what has changed."""

import hashlib
from collections.abc import Mapping

SHOWN = 3  # a new version of the bundle changes dozens of files


def digest(content: str | bytes) -> str:
    """Return the SHA-256 digest in hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name the parts whose digests differ, and those that only one side has: "a, b, c and 4 more"; "" if none does."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
