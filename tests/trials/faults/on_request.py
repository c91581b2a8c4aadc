"""Trials with a model that is served on request: a detector with one worker."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from bundle.catalog import select
from tests.docker.stack import Stack, build_archive
from tests.trials.faults.archives import put
from tests.trials.faults.load import overloaded
from tests.trials.faults.traffic import PoissonTraffic
from tests.trials.faults.trial import Outcome, Trial
from tests.trials.faults.workers import RATE, digit_traffic, killed_only, scale

[CELLS] = select(["cells"])
SMEAR = CELLS.sample_file.read_bytes()
EXPECTED = '"label": "RBC"'
DETECTIONS = 8.0  # requests per second, fewer than one worker answers, in float32 as well


@cache
def store() -> tempfile.TemporaryDirectory:
    """Build the archive, once for all trials, into a folder that is removed when this program ends."""
    folder = tempfile.TemporaryDirectory()
    build_archive(CELLS.name, Path(folder.name))
    return folder


@contextmanager
def detector(stack: Stack) -> Iterator[str]:
    """Serve the model `cells`, which the image does not have, with one worker while the block runs.

    Yields:
        the URL for its predictions.
    """
    put(stack, Path(store().name) / f"{CELLS.name}.mar")
    try:
        stack.client.register(f"{CELLS.name}.mar", CELLS.name)
        scale(stack, CELLS.name, 1)
        yield f"{stack.url('PORT')}/predictions/{CELLS.name}"
    finally:
        stack.client.unregister(CELLS.name, CELLS.bundle.version)


def kill_detector(stack: Stack, seconds: float) -> Outcome:
    with detector(stack) as url, digit_traffic(stack, RATE / 2) as others:
        traffic = PoissonTraffic(url, SMEAR, EXPECTED, DETECTIONS)
        outcome = killed_only(stack, CELLS.name, traffic, seconds)
    outcome.require(all(answer.right for answer in others.answers), "other models are unaffected")
    return outcome


def overload_detector(stack: Stack, seconds: float) -> Outcome:
    with detector(stack) as url, digit_traffic(stack, RATE / 2) as others:
        outcome = overloaded(url, SMEAR, EXPECTED, seconds)
    outcome.require(all(a.right or a.refused for a in others.answers), "no request to other models fails")
    return outcome


TRIALS = (
    Trial(
        "kill-detector",
        "`kill -9` of the only worker of a detector",
        "requests are queued or rejected with Retry-After, none exceeds its deadline; the worker recovers "
        "automatically; other models are unaffected",
        kill_detector,
    ),
    Trial(
        "overload-detector",
        "three times the load that the detector's only worker can handle",
        "the p99 of correct answers is under twice the target of 1 s, and that of rejections as well; normal service "
        "within 5 s; no request to other models fails",
        overload_detector,
    ),
)
