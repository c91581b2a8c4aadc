"""Commands that run in all containers of the stack. A program in place of `docker` records its calls, and ends as told.

tests/docker/test_replicas.py has real containers.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bundle.cli.app import app
from bundle.paths import ROOT
from bundle.server.identity import start_mark
from bundle.server.process import Running, Server
from tests import programs

# files of its folder control it: `containers` has what `docker inspect` prints; `hold-STEP` makes a step wait until the
# file is removed; `status-NAME-COMMAND` has the exit status of a command in a container, whose id is its name;
# `answer-NAME` has what a call of management prints
DOCKER = """#!/bin/sh
cd "$(dirname "$0")"
case $1 in
  compose) sed 's/ [^ ]*$//; s/.* //' containers ;;
  inspect) cat containers ;;
  exec)
    container=$3
    shift 6
    echo "$container: $*" >>calls
    cat >/dev/null
    while [ -e "hold-$2" ]; do sleep 0.02; done
    status=$(cat "status-$container-$1" 2>/dev/null || echo 0)
    [ "$1" != manage ] || cat "answer-$container" 2>/dev/null
    [ "$1" != rollout-step ] || echo "$2 is done" >&2
    [ "$2" != prepare ] || [ "$status" != 0 ] || echo '{"model": "mnist", "old": "1.0", "new": "1.1"}'
    echo "$container: ended" >>calls
    exit "$status" ;;
esac
"""


@dataclass(frozen=True)
class Stack:
    """A stack with the containers a and b, of the project `more`, which is chosen."""

    folder: Path

    def control(self, name: str, text: str | int = "") -> Path:
        file = self.folder / name
        file.write_text(str(text))
        return file

    def healths(self, **names: str) -> None:
        """Set the containers and their health; one that is `stopped` does not run."""
        lines = (
            f"more {'exited' if health == 'stopped' else 'running'} {health} {name} /{name}\n"
            for name, health in names.items()
        )
        self.control("containers", "".join(lines))

    def calls(self) -> list[str]:
        """Return the beginnings and ends of commands in containers, without options."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.split(" mnist")[0].replace("rollout-step ", "") for line in lines]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    stack = Stack(tmp_path)
    stack.control("docker", DOCKER).chmod(0o755)
    stack.control("new.mar")
    stack.healths(a="healthy", b="healthy")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("COMPOSE", "docker compose")
    monkeypatch.setenv("PROJECT", "more")
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    return stack


def roll_out(stack: Stack, *options: str) -> programs.Ended:
    return programs.run(app, "rollout", "mnist", "--archive", str(stack.folder / "new.mar"), *options)


def within(seconds: float, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ran(*steps: str) -> list[str]:
    """Return the calls of steps that ran to their end, one after the other."""
    return [line for step in steps for line in (step, f"{step.split(':')[0]}: ended")]


def interrupted(stack: Stack, held: str, *command: str) -> tuple[int, str]:
    """Interrupt a command while its call in the container a is held; return its exit status and standard error."""
    hold = stack.control(f"hold-{held}")
    said = stack.folder / "said"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", "bundle", *command],
            cwd=ROOT, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        within(60, lambda: any(held in call for call in stack.calls()))
        os.killpg(process.pid, signal.SIGINT)
        within(60, lambda: " has ended in a." in said.read_text())
        hold.unlink()
        return process.wait(60), said.read_text()
    finally:
        hold.unlink(missing_ok=True)
        process.kill()


@pytest.mark.parametrize(
    ("held", "steps"),
    [
        ("prepare", ["a: prepare", "a: undo"]),
        ("switch", ["a: prepare", "b: prepare", "a: switch", "b: undo", "a: undo"]),
    ],
)
def test_interrupted_rollout_waits_for_its_step_and_undoes_it(stack: Stack, held: str, steps: list[str]):
    """A terminal sends Ctrl-C to all programs of its session; in a container, the step goes on."""
    archive = str(stack.folder / "new.mar")
    ended, said = interrupted(stack, held, "rollout", "mnist", "--archive", archive)
    assert ended == 128 + signal.SIGINT
    assert "Waiting until `bundle rollout-step` has ended in a." in said
    assert stack.calls() == ran(*steps)


@pytest.mark.parametrize(("status", "done", "others"), [(0, "a", "b"), (1, "none", "a, b")])
def test_interrupted_call_says_where_it_was_made(stack: Stack, status: int, done: str, others: str):
    stack.control("status-a-manage", status)
    ended, said = interrupted(stack, "PUT", "manage", "PUT", "/models/mnist")
    assert ended == 128 + signal.SIGINT
    assert said.endswith(f"The call succeeded on {done}, and failed or was not made on {others}.\n")
    assert stack.calls() == ran("a: manage PUT /models/mnist")


def test_rollout_of_a_model_that_is_not_served_exits_with_3(stack: Stack):
    stack.control("status-a-rollout-step", 3)
    ended = roll_out(stack)
    assert ended.status == 3
    assert "mnist was not rolled out. `bundle rollout-step` failed in the container a" in ended.stderr
    assert stack.calls() == ran("a: prepare")


def test_rollout_passes_its_timeout_to_every_step(stack: Stack):
    assert roll_out(stack, "--timeout", "7.5").status == 0
    calls = [line for line in (stack.folder / "calls").read_text().splitlines() if "ended" not in line]
    assert len(calls) == 6
    assert all("mnist --timeout 7.5" in call for call in calls), calls


def test_replica_that_starts_is_not_changed(stack: Stack):
    stack.healths(a="healthy", b="starting")
    for ended in (roll_out(stack), programs.run(app, "manage", "PUT", "/models/mnist?min_worker=2")):
        assert ended.status == 1
        assert "error: b is still starting" in ended.stderr
        assert "Wait until `docker ps` shows it as healthy" in ended.stderr
    assert stack.calls() == []


@pytest.mark.parametrize(
    ("healths", "message"),
    [
        (("healthy", "stopped", "healthy"), "b is not running, so not all replicas would change. Start it: "),
        (("stopped", "stopped", "healthy"), "a, b are not running, so not all replicas would change. Start them: "),
    ],
)
def test_replicas_that_are_stopped_are_named_with_the_command_that_starts_them(
    stack: Stack, healths: tuple[str, ...], message: str
):
    """`make up` with other variables than at the start would replace the others, or remove some."""
    stack.healths(**dict(zip("abc", healths, strict=True)))
    for ended in (roll_out(stack), programs.run(app, "manage", "PUT", "/models/mnist?min_worker=2")):
        assert ended.status == 1
        names = [name for name, health in zip("abc", healths, strict=True) if health == "stopped"]
        assert f"error: {message}docker start {' '.join(names)}\n" in ended.stderr
    assert stack.calls() == []


def test_replicas_that_start_are_named(stack: Stack):
    stack.healths(a="starting", b="starting")
    ended = programs.run(app, "manage", "DELETE", "/models/mnist")
    assert "a, b are still starting, and would undo a change when they restore the state of before." in ended.stderr
    assert "shows them as healthy" in ended.stderr


def test_get_is_answered_by_the_replicas_that_run(stack: Stack):
    stack.healths(a="healthy", b="stopped", c="starting")
    ended = programs.run(app, "manage", "get", "/models")
    assert ended.status == 0
    assert ended.stderr == ("No answer: b is not running. Start it: docker start b\nAnswered by: a, c\n")
    assert stack.calls() == ran("a: manage GET /models", "c: manage GET /models")


def test_get_that_fails_on_one_replica_leaves_them_the_same(stack: Stack):
    stack.control("status-a-manage", 1)
    ended = programs.run(app, "manage", "GET", "/models/more")
    assert (ended.status, ended.stderr) == (
        1,
        "error: The call failed on a, as said above, and succeeded on b.\n",
    )


def test_answers_of_several_replicas_are_lines_of_json_with_their_names(stack: Stack):
    stack.control("answer-a", '{\n  "models": []\n}\n')
    stack.control("answer-b", "not JSON\n")
    ended = programs.run(app, "manage", "PUT", "/models/mnist?min_worker=2")
    assert [json.loads(line) for line in ended.stdout.splitlines()] == [
        {"replica": "a", "answer": {"models": []}},
        {"replica": "b", "answer": "not JSON\n"},
    ]
    assert (ended.status, ended.stderr) == (0, "Changed: a, b\n")


def test_answer_of_a_single_container_is_printed_as_it_is(stack: Stack):
    stack.healths(a="healthy")
    stack.control("answer-a", '{\n  "models": []\n}\n')
    ended = programs.run(app, "manage", "GET", "/models")
    assert ended == programs.Ended(0, '{\n  "models": []\n}\n', "Answered by: a\n")


def test_rollout_names_the_replica_in_each_line(stack: Stack):
    lines = roll_out(stack).stderr.splitlines()
    assert sorted(lines) == sorted(
        [f"{name}: {step} is done" for name in "ab" for step in ("prepare", "switch", "finish")] + ["Changed: a, b"]
    )


# --- a server beside the stack --------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of the run folder whose process is this one, and that no request reaches."""
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    server = Server(tmp_path / "run")
    server.run_dir.mkdir()
    pid, nowhere = os.getpid(), "http://127.0.0.1:9"
    server.write_record(Running(pid, start_mark(pid), str(tmp_path), {}, {}, nowhere, nowhere, "127.0.0.1:9"))
    return server


def changes(stack: Stack) -> list[programs.Ended]:
    return [roll_out(stack), programs.run(app, "manage", "PUT", "/models/mnist?min_worker=2")]


def test_server_and_stack_that_both_run_are_not_changed_before_one_is_chosen(stack: Stack, server: Server):
    """Both PROJECT and RUN_DIR are set here, which chooses neither."""
    for ended in changes(stack):
        assert ended == programs.Ended(
            2,
            "",
            f"error: Both run: the server of {server.run_dir} (PID {os.getpid()}), and the Docker stack more. "
            f"Name one of them alone: RUN_DIR={server.run_dir} or PROJECT=more\n",
        )
    assert stack.calls() == []


def test_project_chooses_the_stack(stack: Stack, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RUN_DIR")
    for ended in changes(stack):
        assert (ended.status, ended.stderr.splitlines()[-1]) == (0, "Changed: a, b")
    stack.healths(a="stopped", b="stopped")
    for ended in changes(stack):
        assert (ended.status, ended.stderr) == (
            3,
            "error: The Docker stack more is not running. Start it, with its other variables: make up PROJECT=more\n",
        )


def test_what_docker_says_is_shown_if_nothing_else_runs(stack: Stack, server: Server, monkeypatch: pytest.MonkeyPatch):
    refusal = "permission denied while trying to connect to the Docker daemon socket"
    stack.control("docker", f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    for ended in changes(stack):  # the server is meant
        assert "Docker" not in ended.stderr
    server.record.unlink()
    for ended in changes(stack):
        assert (ended.status, ended.stderr.endswith(f"make serve, or make up. Docker fails: {refusal}\n")) == (3, True)
    monkeypatch.delenv("RUN_DIR")
    for ended in changes(stack):
        expected = f"error: Whether the Docker stack more runs is not known. Docker fails: {refusal}\n"
        assert (ended.status, ended.stderr) == (3, expected)


def test_run_dir_chooses_the_server(stack: Stack, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PROJECT")
    rolled_out, managed = changes(stack)
    assert (rolled_out.status, managed.status) == (1, 1)
    assert "is not a model archive" in rolled_out.stderr  # which a container would say, if it were asked
    assert "No server answers at http://127.0.0.1:9/models/mnist?min_worker=2" in managed.stderr
    server.record.unlink()
    for ended in changes(stack):
        assert ended.status == 3
        assert f"The server of RUN_DIR={server.run_dir} is not running. Start it: make serve RUN_DIR=" in ended.stderr
    assert stack.calls() == []


@pytest.mark.parametrize("health", ["unhealthy", "none"])
def test_replica_that_is_unhealthy_or_has_no_check_is_changed(stack: Stack, health: str):
    """Management may be what mends it."""
    stack.healths(a="healthy", b=health)
    assert programs.run(app, "manage", "GET", "/models").status == 0
    assert stack.calls() == ran("a: manage GET /models", "b: manage GET /models")


@pytest.mark.parametrize(("failed", "done"), [("a", "b"), ("b", "a"), ("a, b", "none")])
def test_manage_calls_every_replica_and_names_those_that_failed(stack: Stack, failed: str, done: str):
    for name in failed.split(", "):
        stack.control(f"status-{name}-manage", 1)
    ended = programs.run(app, "manage", "DELETE", "/models/more")
    assert ended.status == 1
    assert f"The call failed on {failed}, as said above, and succeeded on {done}." in ended.stderr
    assert "Changed" not in ended.stderr
    assert ("The replicas may now differ" in ended.stderr) == (done != "none")
    assert stack.calls() == ran("a: manage DELETE /models/more", "b: manage DELETE /models/more")


def test_manage_exits_with_3_if_no_container_has_a_server(stack: Stack):
    for name in "ab":
        stack.control(f"status-{name}-manage", 3)
    assert programs.run(app, "manage", "GET", "/models").status == 3
