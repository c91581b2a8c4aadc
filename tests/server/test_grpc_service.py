"""Requests of the Open Inference Protocol over gRPC are under the same patches as all others: none is lost.

The handler of these models does not answer in the form of the protocol, so that every request ends with an error. Its
message says whether the handler answered.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.server.bare import Bare
from tests.server.test_frontend_lost import kill
from tests.server.test_frontend_overload import full_queue
from tests.support import wait_for

ANSWERED = "INTERNAL: The model's handler does not answer in the form of the Open Inference Protocol."


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def client(patched: Bare) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(patched.grpc) as connected:
        yield connected


def infer(server: Bare, model: str, body: bytes = b"x") -> str:
    """Return status and message of a request's error."""
    data = triton.InferInput("data", [1], "BYTES").set_data_from_numpy(numpy.array([body], numpy.object_))
    with triton.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException) as raised:
        client.infer(model, [data], client_timeout=60)
    return f"{raised.value.status().removeprefix('StatusCode.')}: {raised.value.message()}"


def test_model_without_metadata_is_described_by_its_name(client: triton.InferenceServerClient):
    metadata = client.get_model_metadata("one")
    assert (metadata.name, metadata.versions, list(metadata.inputs), list(metadata.outputs)) == ("one", ["1.0"], [], [])


def test_failed_batch_and_answer_in_another_form_are_internal_errors(patched: Bare):
    assert infer(patched, "one") == ANSWERED
    assert infer(patched, "one", b"raise") == "INTERNAL: Prediction failed"


def test_request_beyond_the_queue_is_resource_exhausted(patched: Bare):
    with full_queue(patched):
        assert infer(patched, "one").startswith('RESOURCE_EXHAUSTED: The queue of model "one" is full: 2 requests')


def test_request_beyond_the_client_timeout_is_deadline_exceeded_at_once(patched: Bare, pool):
    with patched.holding("late"):
        start = time.monotonic()
        inside = pool.submit(infer, patched, "late", b"hold")
        wait_for(lambda: patched.held("late") or inside.done())
        queued = pool.submit(infer, patched, "late", b"sleep 60")
        for future in (inside, queued):
            assert future.result().startswith("DEADLINE_EXCEEDED: There was no answer within the model's clientTimeout")
        assert time.monotonic() - start > 0.9
    wait_for(lambda: infer(patched, "late") == ANSWERED, 40)


def test_model_that_loses_its_workers_is_not_ready(patched: Bare, client: triton.InferenceServerClient):
    assert client.is_model_ready("two")
    patched.scale("two", 0)
    assert not client.is_model_ready("two")
    assert infer(patched, "two") == 'UNAVAILABLE: The model "two" has no workers. Retry later.'
    patched.restore("two")
    assert client.is_model_ready("two", "1.0")


def test_request_inside_a_killed_worker_is_answered_by_the_next(
    patched: Bare, client: triton.InferenceServerClient, pool
):
    with patched.holding("one"):
        inside = pool.submit(infer, patched, "one", b"hold")
        wait_for(lambda: patched.held("one"))
        [killed] = patched.workers("one")
        with patched.holding("one", "start"):
            kill(patched, "one")
            wait_for(lambda: not client.is_server_ready())
    assert inside.result() == ANSWERED
    assert patched.workers("one") != [killed]


def test_request_that_ends_two_workers_is_an_internal_error(patched: Bare):
    before = patched.exits()
    answer = infer(patched, "two", b"exit")
    assert answer.startswith("INTERNAL: Two workers")
    assert "Do not send it again." in answer
    assert len(patched.exits() - before) == 2
    wait_for(lambda: patched.has_workers("two", 2), 60)
