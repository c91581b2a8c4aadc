"""Follow TorchServe's log files, and count failed requests in its access log."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TextIO

# 2026-11-23T03:19:19,579 - /127.0.0.1:60990 "PUT /predictions/mnist HTTP/1.1" 503 1
FAILED = re.compile(r'"\w+ /(?:predictions|explanations)/([^/?" ]+)(?:/([\d.]+))?[^"]*" (5\d\d) \d+$')


class Follower:
    """Read the lines that are appended to a file, across its rotations."""

    def __init__(self, file: Path):
        self.file = file
        self.stream: TextIO | None = None

    def lines(self) -> list[str]:
        """Return the complete lines since the last call."""
        found: list[str] = []
        try:
            stream = self.stream = self.stream or self.file.open(errors="replace")
            found = rest(stream)
            if self.file.stat().st_ino != os.fstat(stream.fileno()).st_ino:
                found += rest(stream)  # lines written between the last read and the rotation
                stream.close()
                stream = self.stream = self.file.open(errors="replace")
                found += rest(stream)
        except FileNotFoundError:
            pass  # not written yet, or in the middle of a rotation
        return found


def rest(stream: TextIO) -> list[str]:
    """Return the complete lines that a stream has not returned yet."""
    found: list[str] = []
    while True:
        position = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(position)
            return found
        found.append(line.rstrip("\n"))


def count_failures(lines: list[str], models: set[str], failures: Counter[tuple[str, str, str]]) -> None:
    """Count the inference requests that the access log shows as 5xx.

    Args:
        models: names of registered models; other names, which clients may invent, are counted as "unknown".
        failures: counts by model, version (or "default") and status; increased in place.
    """
    for line in lines:
        if match := FAILED.search(line):
            known = match[1] in models
            failures[match[1] if known else "unknown", known and match[2] or "default", match[3]] += 1
