"""A bounded cache of responses to repeated inputs. It is inside a worker, and off unless the settings give a size."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

from pydantic import BaseModel

from handlers.core.slots import Response


class AnswerCache:
    """Keep the most recently used answers.

    A worker serves one version of one model, so a new version starts with an empty cache.

    Args:
        entries: the number of answers; 0 turns the cache off.
    """

    def __init__(self, entries: int):
        self.entries = entries
        self.answers: OrderedDict[bytes, Response] = OrderedDict()

    def key(self, inputs: Iterable[BaseModel], *options: object) -> bytes | None:
        """Return a digest of everything that determines the answer to a request; None if the cache is off.

        It is a digest, so that the size of an entry does not depend on the input.

        Args:
            inputs: the inputs of the request.
            options: everything else that determines the answer.
        """
        if not self.entries:
            return None
        digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
        for each in inputs:
            for name, value in each:
                digest.update(encode_part(name) + encode_part(value))
            digest.update(b".")
        return digest.digest()

    def get(self, key: bytes | None) -> Response | None:
        if key is None or key not in self.answers:
            return None
        self.answers.move_to_end(key)
        return self.answers[key]

    def put(self, key: bytes | None, answer: Response) -> None:
        if key is None:
            return
        self.answers[key] = answer
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
