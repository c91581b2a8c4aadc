"""The frontend's patch `gather`: a free worker takes the requests that wait, at once."""

import time
from concurrent.futures import ThreadPoolExecutor

from bundle.server import frontend
from tests.server.bare import PATIENCE, Bare


def seconds(server: Bare, model: str) -> float:
    """Return how long a lone request takes."""
    start = time.monotonic()
    assert server.post(model).json()["batch"] == 1
    return time.monotonic() - start


def test_lone_request_is_answered_at_once(patched: Bare):
    assert frontend.states(patched.console)["gather"] == "in"
    assert min(seconds(patched, "batches") for _ in range(3)) < PATIENCE / 2


def test_requests_that_come_while_the_worker_is_busy_share_its_next_batch(patched: Bare):
    with ThreadPoolExecutor(8) as pool, patched.holding("batches"):
        first, *later = patched.posted(pool, "batches", b"hold", *[b"x"] * 6)
    assert first.result().json()["batch"] == 1
    assert [answer.result().json()["batch"] for answer in later] == [6] * 6


def test_model_with_fixed_patience_waits_for_a_batch(patched: Bare):
    assert seconds(patched, "patient") >= PATIENCE


def test_lone_request_waits_without_the_patch(unpatched: Bare):
    assert frontend.states(unpatched.console)["gather"] == "off"
    assert seconds(unpatched, "batches") >= PATIENCE
