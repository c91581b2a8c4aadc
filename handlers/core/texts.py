"""Limits of text inputs."""

from pydantic import BaseModel

from handlers.core.errors import EmptyInput, TextTooLong
from handlers.core.settings import PositiveInt


class TextLimits(BaseModel):
    max_characters: PositiveInt = 10_000  # longer texts are rejected


def check_text(text: str, limits: TextLimits) -> None:
    """Check that a text is neither too long nor blank.

    Raises:
        TextTooLong: it has more than `max_characters` characters.
        EmptyInput: it has only white space.
    """
    if len(text) > limits.max_characters:
        raise TextTooLong(f"The text is too long; at most {limits.max_characters} characters are accepted.")
    if not text.strip():
        raise EmptyInput("The text is empty. Send at least one word.")
