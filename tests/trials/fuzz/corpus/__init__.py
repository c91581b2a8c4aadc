"""Generate the inputs that mutations start from: valid inputs of every format that the handlers accept."""

from functools import cache

from bundle import samples
from bundle.catalog import select
from tests.shipped import ON_REQUEST, SHIPPED
from tests.trials.fuzz.corpus.cells import cells, membranes
from tests.trials.fuzz.corpus.graphs import graphs, molecules
from tests.trials.fuzz.corpus.images import digits, images, small
from tests.trials.fuzz.corpus.several import clear, several
from tests.trials.fuzz.corpus.sounds import sounds
from tests.trials.fuzz.corpus.texts import sentences, texts

MODELS = (*SHIPPED, *ON_REQUEST)


@cache
def corpus(model: str) -> dict[str, bytes]:
    """Return the inputs by name, including the model's own sample. Each is a body, to be sent with `headers`."""
    return {"sample": sample(model), **KINDS[model]()}


@cache
def good(model: str) -> dict[str, bytes]:
    """Return inputs for valid requests, by name. They are of several classes, so that a swapped answer is noticed.

    A model may reject some of them.
    """
    return {"sample": sample(model), **GOOD[model]()}


def sample(model: str) -> bytes:
    [folder] = select([model])
    return folder.existing(folder.bundle.sample).read_bytes()


@cache
def headers(model: str) -> dict[str, str]:
    """Return the headers to send an input with."""
    [folder] = select([model])
    return samples.headers(folder.sample_file)


KINDS = {
    "mnist": images,
    "image": images,
    "audio": sounds,
    "text": texts,
    "cells": images,
    "membrane": images,
    "molecule": graphs,
    "avdigits": several,
}
GOOD = {
    "mnist": digits,
    "image": small,
    "audio": sounds,
    "text": sentences,
    "cells": cells,
    "membrane": membranes,
    "molecule": molecules,
    "avdigits": clear,
}
