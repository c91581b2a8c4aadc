"""The commands that change what a running server serves, or all replicas of the Docker stack."""

import json
import sys
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bundle.cli.build import build
from bundle.cli.console import console, note
from bundle.cli.parameters import Model, file_or_dash
from bundle.cli.serve import NOT_RUNNING, make_run_folder
from bundle.errors import BundleError, NotRunning, UsageError

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

    Exit with 3 if no server is running or it does not serve the model.
    """
    from bundle import catalog
    from bundle.server import docker_stack as stack
    from bundle.server.process import Server
    from bundle.server.rollout import LocalReplica, copy, replaced, roll_out

    [folder] = catalog.select([model])
    server = Server()
    running = server.running()
    containers = stack.containers(note) if running is None else []
    if running is None and not containers:
        raise NotRunning(NOTHING_RUNS)
    make_run_folder(server)
    with server.lock(), tempfile.TemporaryDirectory(prefix="rollout-") as temporary:
        if archive is None:
            if running is not None:
                replaced(running.client(), folder, folder.bundle.version)  # before a build, which may take minutes
            build([folder], Path(temporary))
            archive = Path(temporary) / f"{model}.mar"
        elif str(archive) == "-":
            archive = Path(temporary) / f"{model}.mar"
            archive.write_bytes(sys.stdin.buffer.read())
        if running is None:
            try:
                roll_out([stack.ContainerReplica(each, model, timeout) for each in containers], archive, note)
            except BundleError as exc:
                raise type(exc)(f"{model} was not rolled out. {exc}", exc.details) from exc
        else:
            roll_out([LocalReplica(server, running.client(), folder, timeout, note)], archive, note)
            for record in Path(temporary).glob("*.fingerprint"):  # the next `bundle serve` uses an archive built here
                copy(record, server.store / record.name)
            server.adopt(running, folder)


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

    It calls every replica, also after one has refused, and says which replicas have the change.

    Exit with 3 if no server is running.
    """
    from bundle.server import docker_stack as stack
    from bundle.server.client import reason
    from bundle.server.process import Server

    if method.upper() not in ("GET", "POST", "PUT", "DELETE"):
        raise UsageError(f"The method is {method!r}. It must be GET, POST, PUT or DELETE.")
    if not path.startswith("/"):
        raise UsageError(f"The path is {path!r}. It must begin with a slash, such as /models.")
    running = Server().running()
    if running is not None:
        answer = running.client().manage(method.upper(), path)
        console.print(answer.text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        if not answer.ok:
            raise BundleError(
                f"TorchServe refused {method.upper()} {path} with {answer.status_code}: {reason(answer) or answer.text}"
            )
        return
    containers = stack.containers(note)
    if not containers:
        raise NotRunning(NOTHING_RUNS)
    failures: dict[str, BundleError] = {}
    for container in containers:
        note(f"{container.name}:")
        try:
            container.run("manage", method, path)
        except BundleError as exc:
            failures[container.name] = exc
    if failures:
        done = [container.name for container in containers if container.name not in failures]
        kind = NotRunning if not done and all(isinstance(exc, NotRunning) for exc in failures.values()) else BundleError
        raise kind(parted(list(failures), done))


def parted(failed: list[str], done: list[str]) -> str:
    """Return a message that says on which replicas a call has succeeded."""
    return f"The call failed on {', '.join(failed)}, as said above, and succeeded on {', '.join(done) or 'none'}." + (
        " The replicas may now differ: correct the cause and repeat the call. It is made on all of them; one that has "
        "the change may refuse it."
        if done
        else ""
    )
