"""What a system is to the runner: something to install, to serve a case with, and to ask."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from bundle import samples
from bundle.catalog import ModelFolder
from loadtest.bench.cases import Case


def first(answer: bytes) -> tuple[int, float]:
    """The class that comes first in an answer of this project's form, and its probability.

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
    """How requests are put together.

    Attributes:
        size: requests, at most.
        delay: ms that a batch waits to fill.
    """

    size: int
    delay: int


def batching(case: Case) -> Batching:
    """The bundle's own, out of the model's folder: all systems that batch do it so."""
    config = ModelFolder(case.folder).config
    return Batching(config["batchSize"], config["maxBatchDelay"])


@dataclass(frozen=True)
class Endpoint:
    """Where and how a served case is asked.

    Attributes:
        url: what to POST to.
        body: the case's input in the wire form of this system.
        pid: the root of the server's process tree.
        pids: further roots, of servers that are not one tree.
        top: reads the first class and its probability out of an answer.
    """

    url: str
    headers: dict[str, str]
    body: bytes
    pid: int
    pids: tuple[int, ...] = ()
    top: Callable[[bytes], tuple[int, float]] = field(default=first)


class System(Protocol):
    name: str

    @property
    def version(self) -> str:
        """The release that is measured."""

    def install(self) -> None:
        """Makes the system's own environment; does nothing where it is up to date.

        Raises:
            BundleError: its packages cannot be installed.
        """

    def serve(self, case: Case) -> AbstractContextManager[Endpoint]:
        """Starts the system on a free port of 127.0.0.1 and waits until it has answered the case once.

        All its processes are ended with the block, whatever happens in it.

        Raises:
            BundleError: it did not start, or did not answer; the last lines of its log are the details.
        """
