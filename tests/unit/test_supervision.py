"""What a supervisor knows, without a server: logs followed, observations compared, state kept."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle.errors import BundleError
from bundle.mar import MANIFEST
from bundle.supervisor.health import History, Version
from bundle.supervisor.log_follower import Follower, count_failures
from bundle.supervisor.state import Registered, State, archive_of

ME, PARENT = os.getpid(), os.getppid()  # processes that live


def version(workers: dict[str, int], ready: int, minimum: int = 1, name: str = "mnist", number: str = "1.0") -> Version:
    registered = Registered(name, number, f"{name}.mar", minimum, 4, default=True)
    return Version(registered, workers, ready, pending=0, capacity=100)


def manifest_only(file: Path, number: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MANIFEST, json.dumps({"model": {"modelVersion": number}}))


# --- logs --------------------------------------------------------------------------------------------------------


@given(writes=st.lists(st.sampled_from(["line\n", "be", "gun\n", "two\nlines\n", "ROTATE", "READ"]), max_size=25))
def test_a_follower_misses_no_line_and_repeats_none(tmp_path_factory: pytest.TempPathFactory, writes: list[str]):
    """As log4j does it: the file is renamed, and a new one begun; never twice between two readings."""
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
def test_failures_are_counted_by_model_and_status(line: str, counted: tuple | None):
    failures = Counter()
    count_failures([f"2026-11-23T03:19:19,579 - {line}"] * 2, {"mnist", "image"}, failures)
    assert failures == ({counted: 2} if counted else {})


# --- observations ------------------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_as_another_process_is_a_restart():
    history = History()
    for workers in ({"9000": ME}, {"9000": 0}, {"9000": PARENT}, {"9000": PARENT}, {"9001": ME, "9000": PARENT}):
        history.add([version(workers, ready=1)], now=0)
    assert history.restarts == {("mnist", "1.0"): 1}


def test_weakness_lasts_from_its_first_observation_to_recovery():
    history = History()
    for now, ready in enumerate([2, 1, 1, 2, 0]):
        history.add([version({}, ready, minimum=2)], now)
        since = [None, 1, 1, None, 4][now]
        assert history.weak_since == ({} if since is None else {("mnist", "1.0"): since})


def test_what_was_never_at_strength_is_neither_weak_nor_kept():
    history = History()
    history.add([version({}, ready=0, name="bad"), version({}, ready=1)], now=0)
    assert history.weak_since == {}
    assert [kept.name for kept in history.state({}, None).registered] == ["mnist"]


def test_more_workers_are_not_missed_before_they_were_there():
    """A second worker that is asked for takes no request from the first while it starts."""
    history = History()
    for now, (minimum, ready, weak) in enumerate(
        [(1, 1, False), (2, 1, False), (2, 0, True), (2, 2, False), (2, 1, True)]
    ):
        history.add([version({}, ready, minimum=minimum)], now)
        assert bool(history.weak_since) == weak, now
    history.add([version({}, 1, minimum=1)], now=9)  # scaled down
    assert not history.weak_since


def test_what_is_weak_is_not_taken_for_removed():
    history = History()
    history.add([version({}, ready=0), version({}, ready=0, name="text", number="2.0")], now=0)
    earlier = State([version({}, 1, name="text", number="2.0").registered])
    state = history.state({"mnist": "1.0", "image": "1.0"}, earlier)
    assert [kept.key for kept in state.registered] == [("mnist", "1.0"), ("text", "2.0")]
    assert state.removed == {"image": "1.0"}


def test_a_version_that_is_gone_is_forgotten():
    history = History()
    history.add([version({}, ready=1)], now=0)
    history.add([], now=1)
    history.add([version({}, ready=0)], now=2)  # registered anew, and not up yet
    assert history.weak_since == {}


# --- state -------------------------------------------------------------------------------------------------------


def test_state_is_read_as_it_was_written(tmp_path: Path):
    file = tmp_path / "state.json"
    assert State.read(file) is None
    state = State([version({}, 1).registered], {"mnist": "1.0"})
    state.write(file)
    assert State.read(file) == state
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"registered": [{"name": "mnist"}], "removed": {}}'])
def test_a_state_that_cannot_be_read_is_put_aside(tmp_path: Path, text: str):
    file = tmp_path / "state.json"
    file.write_text(text)
    assert State.read(file) is None
    assert (tmp_path / "state.bad").read_text() == text
    assert State.read(file) is None


def test_an_archive_is_found_by_its_version(tmp_path: Path):
    """A rollout promotes mnist-1.1.mar to mnist.mar, and an image may bring another mnist.mar."""
    wanted = Registered("mnist", "1.1", "mnist-1.1.mar", 1, 1, True)
    manifest_only(tmp_path / "mnist.mar", "1.0")
    with pytest.raises(BundleError, match="no archive"):
        archive_of(tmp_path, wanted)
    manifest_only(tmp_path / "mnist.mar", "1.1")
    assert archive_of(tmp_path, wanted).name == "mnist.mar"
    manifest_only(tmp_path / "mnist-1.1.mar", "1.1")
    assert archive_of(tmp_path, wanted).name == "mnist-1.1.mar"
