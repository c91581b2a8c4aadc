"""What mutations start from: valid inputs of every format and shape that the handlers take, all made here."""

from functools import cache

from bundle.catalog import select
from tests.trials.fuzz.corpus.images import digits, images, small
from tests.trials.fuzz.corpus.sounds import sounds
from tests.trials.fuzz.corpus.texts import sentences, texts

MODELS = ("mnist", "image", "audio", "text")


@cache
def corpus(model: str) -> dict[str, bytes]:
    """{name: file}, the model's own sample among them."""
    return {"sample": sample(model), **KINDS[model]()}


@cache
def good(model: str) -> dict[str, bytes]:
    """Asked for beside bad ones of several classes, so that an answer in a wrong slot shows. Some are refused."""
    made = {"mnist": digits, "image": small, "audio": sounds, "text": sentences}[model]()
    return {"sample": sample(model), **made}


def sample(model: str) -> bytes:
    [folder] = select([model])
    return folder.existing(folder.bundle.sample).read_bytes()


KINDS = {"mnist": images, "image": images, "audio": sounds, "text": texts}
