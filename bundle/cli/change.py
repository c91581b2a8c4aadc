"""The commands that change what a running server serves, or all replicas of the Docker stack."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bundle.cli.build import build
from bundle.cli.console import console, note
from bundle.cli.parameters import Model, file_or_dash
from bundle.cli.serve import NOT_RUNNING, make_run_folder
from bundle.errors import BundleError, NotRunning, UsageError
from bundle.paths import relative

if TYPE_CHECKING:
    from bundle.server.docker_stack import Stack
    from bundle.server.process import Running, Server

app = typer.Typer()
NOTHING_RUNS = "TorchServe is not running. Start it: make serve, or make up"
Seconds = Annotated[
    float,
    typer.Option("--timeout", "-t", min=0, help="Seconds to wait for the new version, and for the old one to finish."),
]


@app.command(
    epilog="Examples: `bundle rollout mnist` · `bundle rollout mnist --archive new.mar`"
    " · `bundle rollout mnist --archive - < new.mar`"
)
def rollout(
    model: Model,
    archive: Annotated[
        Path | None,
        typer.Option(
            parser=file_or_dash,
            metavar="FILE",
            help="The new archive, - for standard input. By default, built from the model's folder.",
        ),
    ] = None,
    timeout: Seconds = 300,
) -> None:
    """Replace the version of a model that is served, without a failed request.

    If anything fails, the old version keeps serving; in the Docker stack, on all replicas.

    If both a server and a Docker stack run, PROJECT=... or RUN_DIR=... of make chooses one. Without make,
    COMPOSE is not set, and the stack is not looked for.

    Exit with 3 if no server is running or it does not serve the model.
    """
    from bundle import catalog
    from bundle.server.docker_stack import ContainerReplica
    from bundle.server.process import Server
    from bundle.server.rollout import LocalReplica, copy, replaced, roll_out

    [folder] = catalog.select([model])
    server = Server()
    running, stack = target(server)
    if stack:
        stack.check_change()
    make_run_folder(server)
    with server.lock(), tempfile.TemporaryDirectory(prefix="rollout-") as temporary:
        if archive is None:
            if running:
                replaced(running.client(), folder, folder.bundle.version)  # before a build, which may take minutes
            build([folder], Path(temporary))
            archive = Path(temporary) / f"{model}.mar"
        elif str(archive) == "-":
            archive = Path(temporary) / f"{model}.mar"
            archive.write_bytes(sys.stdin.buffer.read())
        if stack:
            try:
                roll_out([ContainerReplica(each, model, timeout) for each in stack.running], archive, note)
            except BundleError as exc:
                raise type(exc)(f"{model} was not rolled out. {exc}", exc.details) from exc
            note(f"Changed: {', '.join(each.name for each in stack.running)}")
        elif running:
            roll_out([LocalReplica(server, running.client(), folder, timeout, note)], archive, note)
            for record in Path(temporary).glob("*.fingerprint"):  # the next `bundle serve` uses an archive built here
                copy(record, server.store / record.name)
            server.adopt(running, folder)
            note(f"Changed: {called(server, running)}")


def target(server: "Server") -> "tuple[Running, None] | tuple[None, Stack]":
    """Return what a command is to change: this server, or the Docker stack.

    PROJECT or RUN_DIR, given alone, chooses. Otherwise it is the one that runs.

    Raises:
        NotRunning: the chosen one does not run, or none does.
        UsageError: both run, and neither is chosen.
    """
    from bundle.server import docker_stack

    given = [name for name in ("PROJECT", "RUN_DIR") if os.environ.get(name)] if docker_stack.compose() else []
    running = server.running() if given != ["PROJECT"] else None
    stack, unavailable = None, ""
    if given != ["RUN_DIR"]:
        try:
            stack = docker_stack.find(note)
        except docker_stack.Unavailable as exc:  # no fault if the bare server is meant
            unavailable = str(exc)
    if running and stack:
        raise UsageError(
            f"Both run: {called(server, running)}, and the Docker stack {stack.project}. Name one of them alone: "
            f"RUN_DIR={relative(server.run_dir)} or PROJECT={stack.project}"
        )
    if running:
        return running, None
    if stack:
        return None, stack
    if given == ["PROJECT"]:
        if unavailable:
            raise NotRunning(f"Whether the Docker stack {os.environ['PROJECT']} runs is not known. {unavailable}")
        raise NotRunning(
            f"The Docker stack {os.environ['PROJECT']} is not running. Start it, with its other variables: "
            f"make up PROJECT={os.environ['PROJECT']}"
        )
    if given == ["RUN_DIR"]:
        raise NotRunning(
            f"The server of RUN_DIR={relative(server.run_dir)} is not running. Start it: make serve "
            f"RUN_DIR={relative(server.run_dir)}. If you mean a Docker stack, name it: PROJECT=torchserve-bundle"
        )
    raise NotRunning(f"{NOTHING_RUNS}. {unavailable}" if unavailable else NOTHING_RUNS)


def called(server: "Server", running: "Running") -> str:
    """Return what messages call a server of this machine, to tell it from a Docker stack."""
    return f"the server of {relative(server.run_dir)} (PID {running.pid})"


class Step(StrEnum):
    """A step of a rollout on one replica; `Replica` says what each does."""

    prepare = "prepare"
    switch = "switch"
    finish = "finish"
    undo = "undo"


@app.command("rollout-step", hidden=True)
def rollout_step(
    step: Step,
    model: Model,
    prepared: Annotated[str, typer.Option("--rollout", metavar="JSON", help="What `prepare` has printed.")] = "",
    timeout: Seconds = 300,
) -> None:
    """Do one step of a rollout over several replicas on this one. `prepare` reads the archive from standard input."""
    from bundle import catalog
    from bundle.server.process import Server
    from bundle.server.rollout import LocalReplica, Rollout

    [folder] = catalog.select([model])
    server = Server()
    running = server.running()
    if running is None:
        raise NotRunning(NOT_RUNNING)
    replica = LocalReplica(server, running.client(), folder, timeout, note)
    with server.lock():
        if step is Step.prepare:
            with tempfile.TemporaryDirectory(prefix="rollout-") as temporary:
                archive = Path(temporary) / f"{model}.mar"
                archive.write_bytes(sys.stdin.buffer.read())
                print(json.dumps(asdict(replica.prepare(archive))))
            return
        do = {Step.switch: replica.switch, Step.finish: replica.finish, Step.undo: replica.undo}[step]
        do(Rollout(**json.loads(prepared)))
        if step is Step.finish:
            server.adopt(running, folder)


@app.command(epilog="Examples: `bundle manage GET /models` · `bundle manage PUT '/models/mnist?min_worker=2'`")
def manage(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="GET, POST, PUT or DELETE.")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="The path, with its query.")],
) -> None:
    """Call the management API of the running server, or of all replicas of the Docker stack, one after the other.

    It calls every replica, also after one has refused, and says which replicas have the change. It prints
    the answers of several replicas as lines of JSON: {"replica": NAME, "answer": ANSWER}.

    If both a server and a Docker stack run, PROJECT=... or RUN_DIR=... of make chooses one. Without make,
    COMPOSE is not set, and the stack is not looked for.

    Exit with 3 if no server is running.
    """
    from bundle.server import docker_stack
    from bundle.server.client import reason
    from bundle.server.process import Server

    if method.upper() not in ("GET", "POST", "PUT", "DELETE"):
        raise UsageError(f"The method is {method!r}. It must be GET, POST, PUT or DELETE.")
    if not path.startswith("/"):
        raise UsageError(f"The path is {path!r}. It must begin with a slash, such as /models.")
    method, server = method.upper(), Server()
    running, stack = target(server)
    if stack:
        call_replicas(stack, method, path)
    elif running:
        answer = running.client().manage(method, path)
        show(answer.text)
        if not answer.ok:
            raise BundleError(
                f"TorchServe refused {method} {path} with {answer.status_code}: {reason(answer) or answer.text}"
            )
        if docker_stack.compose():  # without it, there is no choice; in a container, the host's command names it
            note(f"{'Answered by' if method == 'GET' else 'Changed'}: {called(server, running)}")


def call_replicas(stack: "Stack", method: str, path: str) -> None:
    """Call the management API of all replicas, one after the other.

    Raises:
        BundleError: a call failed on one, or would leave one unchanged.
    """
    from bundle.server.docker_stack import Interrupted

    changes = method != "GET"
    if changes:
        stack.check_change()
    failures: dict[str, BundleError] = {}
    done = []
    for container in stack.running:
        try:
            answer = container.run("manage", method, path)
        except Interrupted as exc:
            if not exc.failure:
                done.append(container.name)
            others = [each.name for each in stack.running if each.name not in done]
            note(
                f"The call succeeded on {', '.join(done) or 'none'}, and failed or was not made on {', '.join(others)}."
            )
            raise
        except BundleError as exc:
            failures[container.name] = exc
            continue
        done.append(container.name)
        show(json.dumps({"replica": container.name, "answer": parsed(answer)}) if stack.replicas > 1 else answer)
    if stack.stopped:
        note(f"No answer: {stack.why_stopped()}. {stack.how_to_start()}")
    if failures:
        kind = NotRunning if not done and all(isinstance(exc, NotRunning) for exc in failures.values()) else BundleError
        raise kind(parted(list(failures), done, changes))
    note(f"{'Changed' if changes else 'Answered by'}: {', '.join(done)}")


def show(answer: str) -> None:
    console.print(answer.rstrip("\n"), markup=False, highlight=False, emoji=False, soft_wrap=True)


def parsed(answer: str) -> object:
    try:
        return json.loads(answer)
    except ValueError:
        return answer


def parted(failed: list[str], done: list[str], changes: bool) -> str:
    """Return a message that says on which replicas a call has succeeded.

    Args:
        changes: whether the call changes something, so that the replicas may differ after it.
    """
    return f"The call failed on {', '.join(failed)}, as said above, and succeeded on {', '.join(done) or 'none'}." + (
        " The replicas may now differ: correct the cause and repeat the call. It is made on all of them; one that has "
        "the change may refuse it."
        if done and changes
        else ""
    )
