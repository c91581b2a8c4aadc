"""Readiness in the protocols of KServe and Triton, on a server of its own: others have models that are broken."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy
import psutil
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.server.bare import MODELS, ONE_THREAD, PLAIN, Bare, archive, bare
from tests.support import wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    models = {name: MODELS[name] for name in ("one", "two")}
    with bare(tmp_path_factory.mktemp("readiness"), models, **ONE_THREAD) as started:
        yield started


def is_ready(server: Bare, what: str = "health") -> bool:
    answer = requests.get(f"{server.inference}/v2/{what}/ready", timeout=20)
    assert answer.json()["ready"] == (answer.status_code == 200)
    return answer.json()["ready"]


def register(server: Bare, name: str, wait: bool) -> None:
    """Register a model of the store with one worker, and wait for the worker if `wait` is set."""
    registration = {"url": f"{name}.mar", "initial_workers": "1", "synchronous": str(wait).lower()}
    assert requests.post(f"{server.management}/models", params=registration, timeout=60).ok


def test_model_without_workers_is_not_ready(server: Bare):
    server.scale("one", 0)
    try:
        assert not is_ready(server, "models/one")
        answer = requests.get(f"{server.inference}/v1/models/one", timeout=20)
        assert (answer.status_code, answer.json()) == (503, {"name": "one", "ready": False})
        with triton.InferenceServerClient(server.inference.removeprefix("http://")) as client:
            assert not client.is_model_ready("one")
            assert client.is_server_ready()
            content = triton.InferInput("data", [1], "BYTES").set_data_from_numpy(numpy.array([b"x"], numpy.object_))
            with pytest.raises(InferenceServerException, match="no workers") as raised:
                client.infer("one", [content])
        assert raised.value.status() == "503"
    finally:
        server.restore("one")


def test_model_that_is_loading_is_not_ready_and_its_server_stays_ready(server: Bare):
    wait_for(partial(is_ready, server))
    archive(server.folder / "store", "slow", **PLAIN)
    try:
        with server.holding("slow", "start"):
            register(server, "slow", wait=False)
            assert not is_ready(server, "models/slow")
            assert is_ready(server)
        wait_for(partial(is_ready, server, "models/slow"))
    finally:
        requests.delete(f"{server.management}/models/slow", timeout=60)


def test_server_is_not_ready_before_the_models_of_its_start(tmp_path: Path):
    held = tmp_path / "start-slow"
    held.touch()
    with bare(tmp_path, {"one": PLAIN, "slow": PLAIN}, wait=False) as started:
        wait_for(partial(started.has_workers, "one", 1), 120)
        assert not is_ready(started)
        held.unlink()
        wait_for(partial(is_ready, started))
        assert is_ready(started, "models/slow")


def test_model_of_the_start_that_is_registered_again_and_fails_leaves_its_server_ready(server: Bare):
    wait_for(partial(is_ready, server))
    assert requests.delete(f"{server.management}/models/one", timeout=60).ok
    server.break_workers("one")
    try:
        register(server, "one", wait=False)
        assert not is_ready(server, "models/one")
        assert is_ready(server)
    finally:
        (server.folder / "break-one").unlink()
    wait_for(partial(is_ready, server, "models/one"), 120)  # TorchServe waits longer after each start that fails


def test_model_that_failed_before_anybody_asked_is_missed(server: Bare):
    wait_for(partial(is_ready, server))
    archive(server.folder / "store", "later", **PLAIN)
    register(server, "later", wait=True)
    try:
        [ready] = server.workers("later")
        server.break_workers("later")
        psutil.Process(ready).kill()
        wait_for(partial(server.has_workers, "later", 0))
        assert not is_ready(server)
    finally:
        requests.delete(f"{server.management}/models/later", timeout=60)
    assert is_ready(server)


def test_model_whose_workers_were_stopped_on_purpose_is_not_missed_while_it_starts_again(server: Bare):
    wait_for(partial(is_ready, server))
    server.break_workers("one")
    server.scale("one", 0)
    query = {"min_worker": 1, "max_worker": 1}
    try:
        assert requests.put(f"{server.management}/models/one", params=query, timeout=60).status_code == 202
        assert is_ready(server)
        assert not is_ready(server, "models/one")
    finally:
        (server.folder / "break-one").unlink()
        server.restore("one")


def test_server_is_not_ready_until_a_lost_worker_is_replaced(server: Bare):
    wait_for(partial(is_ready, server))
    server.break_workers("two")
    psutil.Process(server.workers("two")[0]).kill()
    wait_for(lambda: not is_ready(server))
    assert not is_ready(server, "models/two")
    assert is_ready(server, "models/one")
    (server.folder / "break-two").unlink()
    wait_for(partial(is_ready, server), 120)  # TorchServe waits longer after each start that fails
    assert is_ready(server, "models/two")
