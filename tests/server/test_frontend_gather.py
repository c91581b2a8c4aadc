"""The frontend's patch `gather`: a free worker takes the requests that wait, at once."""

import time
from concurrent.futures import ThreadPoolExecutor

import requests

from bundle.server import frontend
from tests.server.bare import PATIENCE, Bare, archive


def seconds(server: Bare, model: str) -> float:
    """Return how long a lone request takes."""
    start = time.monotonic()
    assert server.post(model).json()["batch"] == 1
    return time.monotonic() - start


def test_lone_request_is_answered_at_once(patched: Bare):
    assert frontend.states(patched.console)["gather"] == "in"
    assert min(seconds(patched, "batches") for _ in range(3)) < PATIENCE / 2


def check_next_batch(server: Bare, model: str) -> None:
    """Check that requests which come while the worker is busy share its next batch."""
    with ThreadPoolExecutor(8) as pool, server.holding(model):
        first, *later = server.posted(pool, model, b"hold", *[b"x"] * 6)
    assert first.result().json()["batch"] == 1
    assert [answer.result().json()["batch"] for answer in later] == [6] * 6


def test_requests_that_come_while_the_worker_is_busy_share_its_next_batch(patched: Bare):
    check_next_batch(patched, "batches")


def test_maxbatchdelay_of_zero_does_not_end_a_batch(patched: Bare):
    """TorchServe itself would end it after the second request."""
    archive(patched.folder / "store", "hasty", batchSize=8)
    query = {"url": "hasty.mar", "max_batch_delay": 0, "synchronous": "true"}
    answer = requests.post(f"{patched.management}/models", params=query, timeout=120)
    assert answer.status_code == 200, answer.text
    try:
        [described] = requests.get(f"{patched.management}/models/hasty", timeout=20).json()
        assert described["maxBatchDelay"] == 0
        check_next_batch(patched, "hasty")
    finally:
        patched.client().unregister("hasty", "1.0")


def test_model_with_fixed_patience_waits_for_a_batch(patched: Bare):
    assert seconds(patched, "patient") >= PATIENCE


def test_lone_request_waits_without_the_patch(unpatched: Bare):
    assert frontend.states(unpatched.console)["gather"] == "off"
    assert seconds(unpatched, "batches") >= PATIENCE
