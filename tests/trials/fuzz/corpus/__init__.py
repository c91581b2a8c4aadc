"""Generate the inputs that mutations start from: valid inputs of every format that the handlers accept."""

from functools import cache

from bundle.catalog import select
from tests.trials.fuzz.corpus.images import digits, images, small
from tests.trials.fuzz.corpus.sounds import sounds
from tests.trials.fuzz.corpus.texts import sentences, texts

MODELS = ("mnist", "image", "audio", "text")


@cache
def corpus(model: str) -> dict[str, bytes]:
    """Return the inputs by name, including the model's own sample."""
    return {"sample": sample(model), **KINDS[model]()}


@cache
def good(model: str) -> dict[str, bytes]:
    """Return inputs for valid requests, by name. They are of several classes, so that a swapped answer is noticed.

    A model may reject some of them.
    """
    inputs = {"mnist": digits, "image": small, "audio": sounds, "text": sentences}[model]()
    return {"sample": sample(model), **inputs}


def sample(model: str) -> bytes:
    [folder] = select([model])
    return folder.existing(folder.bundle.sample).read_bytes()


KINDS = {"mnist": images, "image": images, "audio": sounds, "text": texts}
