"""A bounded cache of answers to repeated inputs. It is inside a worker, and off unless the settings give a size.

It keeps what `encode` and `explain` return, not the responses. So clients of all protocols share an entry, and each
gets the answers in its own form, with its own id.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from pydantic import BaseModel

from handlers.core.slots import Answer


class AnswerCache:
    """Keep the answers to the most recently used requests.

    A worker serves one version of one model, so a new version starts with an empty cache.

    Args:
        entries: the number of requests; 0 turns the cache off.
    """

    def __init__(self, entries: int):
        self.entries = entries
        self.answers: OrderedDict[bytes, list[Answer]] = OrderedDict()

    def key(self, inputs: Iterable[BaseModel], *options: object) -> bytes | None:
        """Return a digest of everything that determines the answers to a request; None if the cache is off.

        It is a digest, so that the size of an entry does not depend on the input.

        Args:
            inputs: the inputs of the request.
            options: everything else that determines the answers.
        """
        if not self.entries:
            return None
        digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
        for each in inputs:
            for name, value in each:
                digest.update(encode_part(name) + encode_part(value))
            digest.update(b".")
        return digest.digest()

    def get(self, key: bytes | None) -> list[Answer] | None:
        if key is None or key not in self.answers:
            return None
        self.answers.move_to_end(key)
        return self.answers[key]

    def put(self, key: bytes | None, answers: list[Answer]) -> None:
        if key is None:
            return
        self.answers[key] = answers
        self.answers.move_to_end(key)
        if len(self.answers) > self.entries:
            self.answers.popitem(last=False)


def encode_part(value: object) -> bytes:
    """Encode a value, with its type and length, so that different sequences of values have different bytes."""
    if isinstance(value, bytes):
        kind, encoded = b"b", value
    elif isinstance(value, str):
        kind, encoded = b"s", value.encode("utf-8", "surrogatepass")
    else:
        kind, encoded = b"j", repr(value).encode("utf-8", "surrogatepass")
    return kind + len(encoded).to_bytes(8, "big") + encoded
