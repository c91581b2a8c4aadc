"""A rollout over several replicas: all of them, or none. tests/docker/test_replicas.py does it with real ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import requests

from bundle.catalog import select
from bundle.errors import BundleError
from bundle.server.client import Client
from bundle.server.process import Server
from bundle.server.rollout import LocalReplica, PreparedNevertheless, Rollout, roll_out

[MNIST] = select(["mnist"])
ROLLOUT = Rollout("mnist", "1.0", "1.1")


@dataclass
class Recorded:
    """A replica that records its steps in a list of all replicas, and fails at some."""

    name: str
    steps: list[str]
    fails: tuple[str, ...] = ()
    undo_error: ClassVar[type[Exception]] = BundleError

    def _do(self, step: str) -> None:
        self.steps.append(f"{step} {self.name}")
        if step in self.fails:
            raise (self.undo_error if step == "undo" else BundleError)(f"{step} failed on {self.name}")

    def prepare(self, archive: Path) -> Rollout:
        self._do("prepare")
        return ROLLOUT

    def switch(self, rollout: Rollout) -> None:
        self._do("switch")

    def finish(self, rollout: Rollout) -> None:
        self._do("finish")

    def undo(self, rollout: Rollout) -> None:
        self._do("undo")


def in_any_order(steps: list[str]) -> list[str]:
    """Sort the last step, which the replicas do at the same time."""
    return [step for step in steps if "finish" not in step] + sorted(step for step in steps if "finish" in step)


def rolled_out(**fails: tuple[str, ...]) -> tuple[str, list[str], list[str]]:
    """Roll out over the replicas a, b and c, and return the error, the steps and what was reported."""
    steps: list[str] = []
    reported: list[str] = []
    try:
        replicas = [Recorded(name, steps, fails.get(name, ())) for name in "abc"]
        roll_out(replicas, Path("new.mar"), reported.append)
    except BundleError as exc:
        return str(exc), in_any_order(steps), reported
    return "", in_any_order(steps), reported


PREPARED = ["prepare a", "prepare b", "prepare c"]
SWITCHED = ["switch a", "switch b", "switch c"]
FINISHED = ["finish a", "finish b", "finish c"]


def test_no_step_begins_before_all_replicas_have_done_the_last_one():
    assert rolled_out() == ("", PREPARED + SWITCHED + FINISHED, [])


@pytest.mark.parametrize(
    ("fails", "steps"),
    [
        ({"a": ("prepare",)}, ["prepare a"]),
        ({"c": ("prepare",)}, [*PREPARED, "undo b", "undo a"]),
        ({"b": ("switch",)}, [*PREPARED, "switch a", "switch b", "undo c", "undo b", "undo a"]),
    ],
)
def test_failure_before_all_have_switched_is_undone_everywhere(fails: dict, steps: list[str]):
    [(name, [step])] = fails.items()
    assert rolled_out(**fails) == (f"{step} failed on {name}", steps, [])


@pytest.mark.parametrize("error", [BundleError, OSError, requests.ConnectionError])
def test_replica_that_cannot_undo_is_named_and_the_others_undo(monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
    monkeypatch.setattr(Recorded, "undo_error", error)
    said, steps, reported = rolled_out(c=("switch",), b=("undo",))
    assert said == "switch failed on c"
    assert steps == [*PREPARED, *SWITCHED, "undo c", "undo b", "undo a"]
    assert reported == ["mnist 1.1 could not be removed from b: undo failed on b"]


def test_old_version_that_cannot_be_removed_from_one_is_removed_from_the_others():
    assert rolled_out(a=("finish",)) == ("finish failed on a", PREPARED + SWITCHED + FINISHED, [])


def test_interrupted_rollout_is_undone():
    class Interrupted(Recorded):
        def switch(self, rollout: Rollout) -> None:
            raise KeyboardInterrupt

    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        roll_out([Recorded("a", steps), Interrupted("b", steps)], Path("new.mar"), print)
    assert steps == ["prepare a", "prepare b", "switch a", "undo b", "undo a"]


def test_replica_that_has_prepared_in_spite_of_an_interrupt_is_undone():
    class Uninterruptible(Recorded):
        def prepare(self, archive: Path) -> Rollout:
            raise PreparedNevertheless(super().prepare(archive))

    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        roll_out([Recorded("a", steps), Uninterruptible("b", steps)], Path("new.mar"), print)
    assert steps == ["prepare a", "prepare b", "undo b", "undo a"]


def test_message_of_an_old_version_that_stays_names_a_command_for_all_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path))
    replica = LocalReplica(Server(tmp_path), Client("", ""), MNIST, seconds=0, report=print)
    with pytest.raises(BundleError) as failure:
        replica.finish(ROLLOUT)
    assert "mnist 1.1 is served, and so is still 1.0" in str(failure.value)
    assert str(failure.value).endswith(': make manage CALL="DELETE /models/mnist/1.0"')
