"""Answers to inputs that come again: a bounded cache inside a worker, off unless the settings say how large."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable


class AnswerCache:
    """Keeps the answers that were asked for last.

    It lives in one worker, which serves one version of one model, so a new version starts with none.

    Args:
        entries: how many answers; 0 for none.
    """

    def __init__(self, entries: int):
        self.entries = entries
        self.answers: OrderedDict[bytes, dict] = OrderedDict()

    def key(self, contents: Iterable[bytes | str], *options: object) -> bytes | None:
        """Of a request's inputs and all else that decides its answer: a digest, so that an entry's size does not grow
        with its input. None where nothing is kept."""
        if not self.entries:
            return None
        digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
        for content in contents:
            kind, encoded = (
                (b"s", content.encode("utf-8", "surrogatepass")) if isinstance(content, str) else (b"b", content)
            )
            digest.update(kind + len(encoded).to_bytes(8, "big") + encoded)
        return digest.digest()

    def get(self, key: bytes | None) -> dict | None:
        if key is None or key not in self.answers:
            return None
        self.answers.move_to_end(key)
        return self.answers[key]

    def put(self, key: bytes | None, answer: dict) -> None:
        if key is None:
            return
        self.answers[key] = answer
        self.answers.move_to_end(key)
        if len(self.answers) > self.entries:
            self.answers.popitem(last=False)
