"""The interface of a system: install it, serve a case with it, and send requests to it."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from bundle import samples
from bundle.catalog import ModelFolder
from loadtest.bench.cases import Case


def first(answer: bytes) -> tuple[int, float]:
    """Return the first class and its probability in an answer in the form of the bundle.

    Raises:
        ValueError: the answer has another form.
    """
    try:
        best = samples.first(json.loads(answer))
    except ValueError:
        best = None
    if best is None:
        raise ValueError(f"The answer is not a ranking: {answer[:200]!r}")
    return best.class_index, best.probability


@dataclass(frozen=True)
class Batching:
    """The batching of requests.

    Attributes:
        size: maximum number of requests in a batch.
        delay: maximum wait for a batch to fill, in ms.
    """

    size: int
    delay: int


def batching(case: Case) -> Batching:
    """Return the batching in the case's model folder, which all systems with batching use."""
    config = ModelFolder(case.folder).config
    return Batching(config["batchSize"], config["maxBatchDelay"])


@dataclass(frozen=True)
class Endpoint:
    """The request for a served case, and the processes of its server.

    Attributes:
        url: the URL to POST to.
        headers: the headers of every request.
        body: the case's input in the form that this system takes.
        pid: the root of the server's process tree.
        pids: roots of further process trees.
        top: returns the first class and its probability of an answer.
    """

    url: str
    headers: dict[str, str]
    body: bytes
    pid: int
    pids: tuple[int, ...] = ()
    top: Callable[[bytes], tuple[int, float]] = field(default=first)


class System(Protocol):
    @property
    def name(self) -> str:
        """The name in options and reports."""

    @property
    def version(self) -> str:
        """The measured release."""

    def install(self) -> None:
        """Make the system's own environment, unless it is up to date.

        Raises:
            BundleError: its packages cannot be installed.
        """

    def serve(self, case: Case) -> AbstractContextManager[Endpoint]:
        """Start the system on a free port of 127.0.0.1, and wait until it has answered the case once.

        At the end of the block, all its processes are ended.

        Raises:
            BundleError: the system did not start or did not answer. The details are the last lines of its log.
        """
