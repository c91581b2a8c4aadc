"""Batches of token ids: truncation and padding as the tokenizer declares them."""

from dataclasses import dataclass
from typing import Literal

import numpy
from tokenizers import Tokenizer

Argument = Literal["ids", "mask", "types"]  # what a module of texts can take, each int64 [N, T]
PADDINGS = ("[PAD]", "<pad>", "<|pad|>", "[pad]", "<PAD>", "PAD")  # what tokenizers call the token that fills up a text


@dataclass(frozen=True)
class Padding:
    """How the texts of a batch become equally long.

    Attributes:
        token: the token that fills up a text; None if the tokenizer has none.
        type: the type of that token.
        left: whether it is put before a text, not behind it.
        least: the least length of a batch, in tokens.
        multiple: the length is a multiple of this.
    """

    token: int | None
    type: int = 0
    left: bool = False
    least: int = 0
    multiple: int = 1

    def width(self, longest: int) -> int:
        """Return the length of a batch whose longest text has this many tokens."""
        width = max(longest, self.least)
        return width + -width % self.multiple

    def mask(self, lengths: numpy.ndarray) -> numpy.ndarray:
        """Return where the texts of these lengths have tokens, bool [N, T]."""
        mask = numpy.arange(self.width(lengths.max())) < lengths[:, None]
        return mask[:, ::-1] if self.left else mask


def padding_of(tokenizer: Tokenizer, token: int | None = None, least: int | None = None) -> Padding:
    """Return the padding that a tokenizer declares; if it declares none, with its token of a usual name, on the right.

    Args:
        token, least: if given, they replace the tokenizer's own.
    """
    declared = tokenizer.padding or {}
    if token is None:
        found = (tokenizer.token_to_id(name) for name in PADDINGS)
        token = declared.get("pad_id", next((each for each in found if each is not None), None))
    return Padding(
        token=token,
        type=declared.get("pad_type_id", 0),
        left=declared.get("direction") == "left",
        least=(declared.get("length") or 0) if least is None else least,
        multiple=declared.get("pad_to_multiple_of") or 1,
    )


def truncate(tokenizer: Tokenizer, tokens: int | None) -> int:
    """Make the tokenizer truncate texts, on the side that it declares, and return their greatest length in tokens.

    Args:
        tokens: the greatest length; by default, the tokenizer's own.

    Raises:
        ValueError: neither the setting nor the tokenizer says it.
    """
    declared = tokenizer.truncation or {}
    limit = tokens or declared.get("max_length")
    if not limit:
        raise ValueError(
            "max_tokens: tokenizer.json has no truncation. Set `max_tokens` in the section `handler:` to the longest "
            "text that the model takes, in tokens"
        )
    tokenizer.enable_truncation(limit, direction=declared.get("direction", "right"))
    return limit
