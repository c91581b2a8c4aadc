"""Answers to inputs that come again: a bounded cache inside a worker, off unless the settings say how large."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from pydantic import BaseModel


class AnswerCache:
    """Keeps the answers that were asked for last.

    It lives in one worker, which serves one version of one model, so a new version starts with none.

    Args:
        entries: how many answers; 0 for none.
    """

    def __init__(self, entries: int):
        self.entries = entries
        self.answers: OrderedDict[bytes, str] = OrderedDict()

    def key(self, inputs: Iterable[BaseModel], *options: object) -> bytes | None:
        """Return a digest of a request's inputs and of all else that decides its answer; None if the cache is off.

        A digest, so that an entry's size does not grow with its input.
        """
        if not self.entries:
            return None
        digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
        for each in inputs:
            for name, value in each:
                digest.update(part(name) + part(value))
            digest.update(b".")
        return digest.digest()

    def get(self, key: bytes | None) -> str | None:
        if key is None or key not in self.answers:
            return None
        self.answers.move_to_end(key)
        return self.answers[key]

    def put(self, key: bytes | None, answer: str) -> None:
        if key is None:
            return
        self.answers[key] = answer
        self.answers.move_to_end(key)
        if len(self.answers) > self.entries:
            self.answers.popitem(last=False)


def part(value: object) -> bytes:
    """Encode a value so that no two sequences of values have the same bytes."""
    if isinstance(value, bytes):
        kind, encoded = b"b", value
    elif isinstance(value, str):
        kind, encoded = b"s", value.encode("utf-8", "surrogatepass")
    else:
        kind, encoded = b"j", repr(value).encode("utf-8", "surrogatepass")
    return kind + len(encoded).to_bytes(8, "big") + encoded
