"""The supervisor without a server: following logs, comparing observations, keeping and merging state."""

import json
import os
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer

from bundle.errors import BundleError
from bundle.mar import MANIFEST
from bundle.server.client import Client
from bundle.supervisor.exporter import Exporter
from bundle.supervisor.health import History, Version, observe
from bundle.supervisor.log_follower import Follower, count_failures
from bundle.supervisor.state import Registered, State, archive_of, merge, missing

ME, PARENT = os.getpid(), os.getppid()  # two running processes


def version(workers: dict[str, int], ready: int, minimum: int = 1, name: str = "mnist", number: str = "1.0") -> Version:
    registered = Registered(name, number, f"{name}.mar", minimum, 4, default=True)
    return Version(registered, workers, ready, pending=0, capacity=100)


def manifest_only(file: Path, number: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MANIFEST, json.dumps({"model": {"modelVersion": number}}))


# --- logs --------------------------------------------------------------------------------------------------------


@given(writes=st.lists(st.sampled_from(["line\n", "be", "gun\n", "two\nlines\n", "ROTATE", "READ"]), max_size=25))
def test_follower_returns_every_line_once(tmp_path_factory: pytest.TempPathFactory, writes: list[str]):
    """log4j rotates a log: it renames the file and begins a new one, at most once between two reads."""
    folder = tmp_path_factory.mktemp("logs")
    file = folder / "access.log"
    follower = Follower(file)
    written, read, rotated = "", [], False
    for number, text in enumerate(writes):
        if text == "READ":
            read += follower.lines()
            rotated = rotated and not file.exists()
        elif text == "ROTATE":
            if not rotated and file.exists() and written.endswith("\n") and follower.stream:
                file.rename(folder / f"access.{number}.log")
                rotated = True
        else:
            with file.open("a") as stream:
                stream.write(text)
            written += text
    read += follower.lines()
    complete = written[: written.rfind("\n") + 1]
    assert read == complete.splitlines()


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ('/10.0.0.7:39328 "POST /predictions/mnist HTTP/1.1" 503 11', ("mnist", "default", "503")),
        ('/10.0.0.7:39328 "PUT /predictions/mnist/1.0 HTTP/1.1" 500 11', ("mnist", "1.0", "500")),
        ('/10.0.0.7:39328 "POST /explanations/image?x=1 HTTP/1.1" 507 11', ("image", "default", "507")),
        ('/10.0.0.7:39328 "POST /predictions/made-up/7 HTTP/1.1" 500 11', ("unknown", "default", "500")),
        ('/10.0.0.7:39328 "POST /predictions/mnist HTTP/1.1" 400 11', None),
        ('/10.0.0.7:39328 "GET /models/mnist HTTP/1.1" 500 11', None),
    ],
)
def test_failed_requests_are_counted_by_model_and_status(line: str, counted: tuple | None):
    failures = Counter()
    count_failures([f"2026-11-23T03:19:19,579 - {line}"] * 2, {"mnist", "image"}, failures)
    assert failures == ({counted: 2} if counted else {})


# --- observations ------------------------------------------------------------------------------------------------


def test_worker_with_a_new_process_counts_as_restart():
    history = History()
    for workers in ({"9000": ME}, {"9000": 0}, {"9000": PARENT}, {"9000": PARENT}, {"9001": ME, "9000": PARENT}):
        history.add([version(workers, ready=1)], now=0)
    assert history.restarts == {("mnist", "1.0"): 1}


def test_degraded_version_is_dated_from_first_observation_to_recovery():
    history = History()
    for now, ready in enumerate([2, 1, 1, 2, 0]):
        history.add([version({}, ready, minimum=2)], now)
        since = [None, 1, 1, None, 4][now]
        assert history.degraded_since == ({} if since is None else {("mnist", "1.0"): since})


def test_version_whose_workers_failed_between_two_observations_is_degraded(httpserver: HTTPServer):
    """Its workers were READY for less than the time from one observation to the next."""
    url = httpserver.url_for("").rstrip("/")
    queue = {"pendingRequests": 0, "remainingCapacity": 9}

    def described(name: str, workers: dict[str, str]) -> dict:
        facts = {"modelName": name, "modelVersion": "1.0", "modelUrl": f"{name}.mar", "minWorkers": len(workers)}
        listed = [{"id": worker, "status": status, "pid": 0} for worker, status in workers.items()]
        return facts | {"maxWorkers": 2, "workers": listed, "jobQueueStatus": queue}

    models = {
        "good": described("good", {"9000": "READY"}),
        "failed": described("failed", {"9001": "WORKER_STOPPED", "9002": "WORKER_STARTED"}),
        "half": described("half", {"9003": "WORKER_STOPPED", "9004": "WORKER_STARTED"}),
        "starts": described("starts", {"9005": "WORKER_STARTED"}),
    }
    listed = [{"modelName": name, "modelUrl": ""} for name in models]
    httpserver.expect_request("/models").respond_with_json({"models": listed})
    for name, description in models.items():
        httpserver.expect_request(f"/models/{name}").respond_with_json([description])
        httpserver.expect_request(f"/models/{name}/all").respond_with_json([description])
    series = 'WorkerLoadTime{{WorkerName="W-{}-{}_1.0",Level="Host",Hostname="vm",}} 7.0'
    lines = [series.format(*of) for of in ((9000, "good"), (9001, "failed"), (9002, "failed"), (9003, "half"))]
    httpserver.expect_request("/metrics").respond_with_data("\n".join(["# TYPE WorkerLoadTime gauge", *lines, ""]))
    history = History()
    history.add(observe(Client(url, url), url), now=0)
    assert history.degraded_since == {("failed", "1.0"): 0}


def test_version_that_never_became_ready_is_not_tracked():
    history = History()
    history.add([version({}, ready=0, name="bad"), version({}, ready=1)], now=0)
    assert history.degraded_since == {}
    assert [kept.name for kept in history.state({}, State()).registered] == ["mnist"]


def test_added_workers_are_not_missing_while_they_start():
    """The other workers serve all requests while a new one starts."""
    history = History()
    for now, (minimum, ready, degraded) in enumerate(
        [(1, 1, False), (2, 1, False), (2, 0, True), (2, 2, False), (2, 1, True)]
    ):
        history.add([version({}, ready, minimum=minimum)], now)
        assert bool(history.degraded_since) == degraded, now
    history.add([version({}, 1, minimum=1)], now=9)  # scaled down
    assert not history.degraded_since


def test_degraded_version_does_not_count_as_removed():
    history = History()
    history.add([version({}, ready=0), version({}, ready=0, name="text", number="2.0")], now=0)
    earlier = State([version({}, 1, name="text", number="2.0").registered])
    state = history.state({"mnist": "1.0", "image": "1.0"}, earlier)
    assert [kept.key for kept in state.registered] == [("mnist", "1.0"), ("text", "2.0")]
    assert state.removed == {"image": "1.0"}


def test_unregistered_version_is_forgotten():
    history = History()
    history.add([version({}, ready=1)], now=0)
    history.add([], now=1)
    history.add([version({}, ready=0)], now=2)  # registered again, and still starting
    assert history.degraded_since == {}


# --- state -------------------------------------------------------------------------------------------------------


def test_written_state_is_read_unchanged(tmp_path: Path):
    file = tmp_path / "state.json"
    assert State.read(file) is None
    state = State([version({}, 1).registered], {"mnist": "1.0"}, {"mnist": 4})
    state.write(file)
    assert State.read(file) == state
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]


def test_state_of_an_earlier_bundle_has_no_given_workers(tmp_path: Path):
    file = tmp_path / "state.json"
    file.write_text('{"registered": [], "removed": {"mnist": "1.0"}}')
    assert State.read(file) == State([], {"mnist": "1.0"}, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"registered": [{"name": "mnist"}], "removed": {}}'])
def test_invalid_state_file_is_renamed(tmp_path: Path, text: str):
    file = tmp_path / "state.json"
    file.write_text(text)
    assert State.read(file) is None
    assert (tmp_path / "state.bad").read_text() == text
    assert State.read(file) is None


def test_invalid_state_file_is_renamed_by_one_of_several_replicas(tmp_path: Path):
    file = tmp_path / "state.json"
    failures = []

    def read() -> None:
        begin.wait()
        try:
            State.read(file)
        except OSError as exc:
            failures.append(exc)

    for _ in range(100):
        file.write_text("{")
        begin = threading.Barrier(4)
        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert failures == []


def test_archive_is_found_by_its_version(tmp_path: Path):
    """A rollout promotes mnist-1.1.mar to mnist.mar, and an image may bring another mnist.mar."""
    wanted = Registered("mnist", "1.1", "mnist-1.1.mar", 1, 1, True)
    manifest_only(tmp_path / "mnist.mar", "1.0")
    with pytest.raises(BundleError, match="no archive"):
        archive_of(tmp_path, wanted)
    manifest_only(tmp_path / "mnist.mar", "1.1")
    assert archive_of(tmp_path, wanted).name == "mnist.mar"
    manifest_only(tmp_path / "mnist-1.1.mar", "1.1")
    assert archive_of(tmp_path, wanted).name == "mnist-1.1.mar"


# --- restoring ----------------------------------------------------------------------------------

V1, V2 = Registered("mnist", "1.0", "mnist.mar", 2, 2, False), Registered("mnist", "2.0", "new.mar", 2, 2, True)
FALLBACK = State([replace(V1, default=True)])  # 2.0 did not become READY: 1.0 is served instead


@pytest.fixture
def store(tmp_path: Path) -> Path:
    manifest_only(tmp_path / "mnist.mar", "1.0")
    manifest_only(tmp_path / "new.mar", "2.0")
    return tmp_path


def test_version_that_failed_to_restore_is_kept_and_reported(store: Path):
    kept = merge(State([V1, V2]), FALLBACK, FALLBACK, store)
    assert kept == State([V1, V2])
    assert missing(kept, FALLBACK) == [V2.key]
    assert missing(kept, State([V1, V2])) == []


def test_version_without_an_archive_is_forgotten(store: Path):
    (store / "new.mar").unlink()
    assert merge(State([V1, V2]), FALLBACK, FALLBACK, store) == FALLBACK
    manifest_only(store / "new.mar", "2.1")
    assert merge(State([V1, V2]), FALLBACK, FALLBACK, store) == FALLBACK


def test_version_with_an_unreadable_archive_is_kept(store: Path):
    (store / "new.mar").write_bytes(b"half of an archive")
    assert merge(State([V1, V2]), FALLBACK, FALLBACK, store) == State([V1, V2])


def test_version_that_management_removed_is_forgotten(store: Path):
    both = State([V1, V2])
    assert merge(both, both, FALLBACK, store) == FALLBACK


def test_version_registered_again_by_hand_keeps_its_new_state(store: Path):
    now = State([replace(V1, default=True), replace(V2, minimum=1, default=False)])
    kept = merge(State([V1, V2]), FALLBACK, now, store)
    assert kept.workers() == now.workers()
    assert missing(kept, now) == [V2.key]  # it is not yet the default again


def test_default_set_by_hand_replaces_the_saved_one(store: Path):
    """2.0 is still to be restored, but not as the default."""
    third = Registered("mnist", "3.0", "third.mar", 1, 1, True)
    kept = merge(State([V1, V2]), FALLBACK, State([V1, third]), store)
    assert kept.registered == [V1, third, replace(V2, default=False)]


def test_workers_that_failed_to_restore_are_kept(store: Path):
    saved, fewer = State([replace(V2, minimum=3, maximum=4)]), State([V2])
    assert merge(saved, fewer, fewer, store) == saved
    assert missing(saved, fewer) == [V2.key]
    one = State([replace(V2, minimum=1, maximum=1)])
    assert merge(saved, fewer, one, store) == one  # scaled by hand since


@pytest.mark.parametrize(
    ("before", "given", "outdated"),
    [
        ({}, {}, False),
        ({"mnist": 2}, {"mnist": 2}, False),
        ({"mnist": 2}, {"mnist": 3}, True),
        ({"mnist": 2}, {}, True),
        ({}, {"mnist": 2}, True),
    ],
)
def test_saved_workers_are_forgotten_if_another_number_is_given(before: dict, given: dict, outdated: bool):
    """Those of other versions, and of other models, are kept."""
    text = Registered("text", "1.0", "text.mar", 1, 1, True)
    saved = State([V1, V2, text], {"image": "1.0"}, before)
    expected = replace(saved, registered=[V2, text]) if outdated else saved
    assert saved.without_outdated(given, {"mnist": "1.0", "text": "1.0"}) == expected


def test_given_workers_are_saved(store: Path):
    now = State([V2], given={"mnist": 3})
    assert merge(State([V2], given={"mnist": 2}), State([V2]), now, store) == now


def test_default_that_failed_to_restore_is_kept(store: Path):
    now = State([replace(V1, default=True), replace(V2, default=False)])
    kept = merge(State([V1, V2]), now, now, store)
    assert kept == State([V1, V2])
    assert missing(kept, now) == [V2.key]


def test_removal_that_failed_to_restore_is_kept(store: Path):
    """2.0 had replaced 1.0. 1.0 serves again until 2.0 is restored."""
    saved = State([V2], {"mnist": "1.0"})
    kept = merge(saved, FALLBACK, FALLBACK, store)
    assert kept == saved
    assert missing(kept, FALLBACK) == [V2.key, V1.key]
    alone = State([], {"mnist": "1.0"})
    assert merge(alone, FALLBACK, FALLBACK, store) == alone


def test_removal_is_forgotten_if_nothing_else_is_left(store: Path):
    (store / "new.mar").unlink()
    assert merge(State([V2], {"mnist": "1.0"}), FALLBACK, FALLBACK, store) == FALLBACK


def test_removal_is_forgotten_if_management_changed_the_version(store: Path):
    now = State([replace(V1, minimum=1, default=True)])
    assert merge(State([V2], {"mnist": "1.0"}), FALLBACK, now, store).removed == {}


VERSIONS = st.builds(
    Registered,
    name=st.sampled_from(["mnist", "text"]),
    version=st.sampled_from(["1.0", "2.0"]),
    url=st.just("any.mar"),
    minimum=st.integers(0, 2),
    maximum=st.just(2),
    default=st.just(False),
)


@given(
    saved=st.lists(VERSIONS, unique_by=lambda version: version.key),
    restored=st.lists(VERSIONS, unique_by=lambda version: version.key),
)
def test_no_saved_version_is_lost_without_management(saved, restored, tmp_path_factory: pytest.TempPathFactory):
    """Whatever a restore achieves, and at every start."""
    store = tmp_path_factory.mktemp("store")
    (store / "any.mar").write_bytes(b"unreadable: its version is unknown")
    now = State(restored)
    kept = merge(State(saved), now, now, store)
    assert State(saved).workers().items() <= kept.workers().items()
    assert merge(kept, now, now, store) == kept
    assert set(missing(kept, now)) == {key for key, _ in State(saved).workers().items() - now.workers().items()}


# --- exporter -----------------------------------------------------------------------------------


def test_versions_that_are_not_restored_are_exported_and_leave_the_server_ready():
    history = History(latest=[version({}, 1)], not_restored=[V2.key])
    exporter = Exporter(history, Counter(), lambda: "", lambda: False)
    server = exporter.serve("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        ready, metrics = requests.get(f"{url}/ready", timeout=30), requests.get(f"{url}/metrics", timeout=30)
    finally:
        server.shutdown()
        server.server_close()
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "not_restored": ["mnist 2.0"]}
    assert 'bundle_not_restored{model_name="mnist",model_version="1.0"} 0.0' in metrics.text
    assert 'bundle_not_restored{model_name="mnist",model_version="2.0"} 1.0' in metrics.text


@pytest.mark.parametrize(
    ("unready", "ready"), [("", 200), ("starting", 503), ("draining", 503), ("mnist 1.0 lacks workers", 503)]
)
def test_server_that_is_not_ready_is_live(unready: str, ready: int):
    """Otherwise, Kubernetes would end a server that starts or drains."""
    exporter = Exporter(History(), Counter(), lambda: unready, lambda: unready == "draining")
    server = exporter.serve("127.0.0.1", 0)
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        answers = {path: requests.get(f"{url}/{path}", timeout=30).status_code for path in ("ready", "live", "other")}
    finally:
        server.shutdown()
        server.server_close()
    assert answers == {"ready": ready, "live": 200, "other": 404}
