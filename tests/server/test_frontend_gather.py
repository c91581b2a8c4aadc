"""The frontend's patch `gather`: a free worker takes the requests that wait, at once."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bundle.server import frontend
from tests.server.bare import Bare, bare

DELAY = 1.0
WAITS = {"batchSize": 8, "maxBatchDelay": int(DELAY * 1000)}
MODELS = {"greedy": WAITS, "patient": {**WAITS, "patience": "fixed"}}


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with bare(tmp_path_factory.mktemp("patched"), MODELS) as server:
        yield server


def seconds(server: Bare, model: str) -> float:
    """Return how long a lone request takes: the fastest of three."""
    durations = []
    for _ in range(3):
        start = time.monotonic()
        assert server.post(model).json()["batch"] == 1
        durations.append(time.monotonic() - start)
    return min(durations)


def test_lone_request_is_answered_at_once(patched: Bare):
    assert frontend.states(patched.console)["gather"] == "in"
    assert seconds(patched, "greedy") < DELAY / 2


def test_requests_that_come_while_the_worker_is_busy_share_its_next_batch(patched: Bare):
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(patched.post, "greedy", b"sleep 1")
        time.sleep(0.3)
        later = list(pool.map(lambda _: patched.post("greedy"), range(6)))
    assert first.result().json()["batch"] == 1
    assert [answer.json()["batch"] for answer in later] == [6] * 6


def test_model_with_fixed_patience_waits_for_a_batch(patched: Bare):
    assert seconds(patched, "patient") >= DELAY


def test_lone_request_waits_without_the_patch(tmp_path: Path):
    with bare(tmp_path, MODELS, off="gather") as server:
        assert frontend.states(server.console)["gather"] == "off"
        assert seconds(server, "greedy") >= DELAY
