"""The commands behind `make`."""

import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import requests
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bundle import catalog
from bundle.catalog import ModelFolder
from bundle.cli import supply_chain
from bundle.cli import tune as tuning
from bundle.errors import BundleError
from bundle.paths import relative
from bundle.server.client import WorkerCount, check_sample, curl_lines
from bundle.server.process import Running, Server
from bundle.server.readiness import wait_until_ready

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode="markdown")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Models = Annotated[
    list[str] | None, typer.Argument(help="Names of folders in models/; by default, all but those served on request.")
]


@contextmanager
def progress() -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


@app.command(epilog="Examples: `python -m bundle archive` · `python -m bundle archive mnist --force`")
def archive(
    models: Models = None, force: Annotated[bool, typer.Option(help="Build even what is up to date.")] = False
) -> None:
    """Build the models' archives in model_store/, where something that goes into them has changed."""
    build(catalog.select(models or []), Server().store, force)


def build(folders: list[ModelFolder], store: Path, force: bool = False) -> None:
    from bundle.build.archive import (
        archive as build_archive,  # imports torch: seconds that the other commands need not wait
    )

    with progress() as bars:
        for folder in folders:
            task = bars.add_task(f"archive {folder.name}", total=1, state="")
            built = build_archive(folder, store, force)
            megabytes = built.path.stat().st_size / 1e6
            bars.update(task, completed=1, state=f"{'built' if built.rebuilt else 'up to date'}, {megabytes:.1f} MB")
            for note in built.notes:
                bars.console.print(f"  {folder.name}: {note}", markup=False)


@app.command(
    epilog="Examples: `python -m bundle serve` · `python -m bundle serve mnist text`"
    " · `TS_INFERENCE_ADDRESS=http://127.0.0.1:9080 python -m bundle serve`"
)
def serve(
    models: Models = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait until every worker is READY.")] = 300,
) -> None:
    """Build what is out of date, start TorchServe, and return when every model answers its own sample correctly."""
    folders = catalog.select(models or [])
    server = Server()
    server.settings.check()
    with server.lock():
        build(folders, server.store)
        running = server.running()
        if running and not server.is_current(running, folders):
            server.check(folders)  # before what serves is stopped
            console.print(f"{server.restart_reason(running, folders)} It is restarted.", markup=False)
            server.stop()
            running = None
        if running is None:
            running = start(server, folders, timeout)
            console.print(f"TorchServe is up: PID {running.pid}, logs in {relative(server.logs)}.")
        else:
            prove(server, running, folders, timeout)
            console.print(f"Already served by PID {running.pid}; nothing has changed.")
    console.print("\nTry:")
    for line in curl_lines(running.client(), folders):
        console.print(f"  {line}", soft_wrap=True, markup=False)


def start(server: Server, folders: list[ModelFolder], timeout: float) -> Running:
    """Starts the server and waits until it serves; whatever goes wrong, Ctrl-C included, nothing is left running."""
    running = server.start(folders)
    try:
        prove(server, running, folders, timeout)
    except BaseException:
        server.stop()
        raise
    return running


def prove(server: Server, running: Running, folders: list[ModelFolder], timeout: float) -> None:
    """Waits for every model's workers, and has each model answer its own sample."""
    with progress() as bars:
        tasks = {folder.name: bars.add_task(f"start {folder.name}", total=1, state="") for folder in folders}

        def show(name: str, count: WorkerCount) -> None:
            state = f"{count.ready}/{count.wanted} workers READY"
            bars.update(tasks[name], total=count.wanted, completed=count.ready, state=state)

        wait_until_ready(server, running, folders, timeout, show)
    for folder in folders:
        first = check_sample(running.client(), folder)
        if first is not None:
            expected = ", as expected" if folder.bundle.expect else ""
            console.print(f"  {folder.name}: {folder.bundle.sample} is {first!r}{expected}", markup=False)


@app.command(
    epilog="Examples: `python -m bundle run` · `python -m bundle run mnist --state state.json --address 0.0.0.0:8083`"
)
def run(
    models: Models = None,
    address: Annotated[
        str, typer.Option(envvar="BUNDLE_ADDRESS", help="Where /metrics and /ready of the supervisor are.")
    ] = "127.0.0.1:8083",
    state: Annotated[
        Path | None, typer.Option(envvar="BUNDLE_STATE", help="File that keeps what the management API changed.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(envvar="BUNDLE_GATE", help="Folder where the file `closed` tells a proxy to wait.")
    ] = None,
    archives: Annotated[
        Path | None, typer.Option(envvar="BUNDLE_ARCHIVES", help="Folder of archives to put into the store, each once.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(envvar="BUNDLE_START_SECONDS", help="Seconds to wait until every worker is READY.")
    ] = 300,
    patience: Annotated[
        float, typer.Option(envvar="BUNDLE_PATIENCE_SECONDS", help="Seconds that a model may lack workers.")
    ] = 120,
    drain: Annotated[
        float, typer.Option(envvar="BUNDLE_DRAIN_SECONDS", help="Seconds to wait for requests in flight at the end.")
    ] = 90,
) -> None:
    """Run TorchServe in the foreground, with the archives that there are. SIGTERM drains it; it ends with status 1 when
    TorchServe dies or a model's workers do not come back, for a container's restart policy to see."""
    from bundle.supervisor.supervisor import Options, Supervisor, install_archives

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BundleError(f"--address is {address!r}, and must look like 127.0.0.1:8083.")
    server = Server()
    if archives:
        install_archives(archives, server.store, say)
    folders = [folder for folder in catalog.select(models or []) if models or server.archive(folder).is_file()]
    if missing := [folder.name for folder in folders if not server.archive(folder).is_file()]:
        raise BundleError(f"There is no archive of {', '.join(missing)} in {server.store}. Build it: make archive")
    if not folders:
        raise BundleError(f"There are no archives in {server.store}. Build them: make archive")
    options = Options(host, int(port), state, gate, timeout, patience, drain)
    with server.lock():
        server.stop()  # what a killed predecessor may have left
    Supervisor(server, options, say).run(folders, start)


def say(line: str) -> None:
    """For a log: as it happens, without wrapping."""
    print(f"bundle: {line}", flush=True)


@app.command(
    epilog="Examples: `python -m bundle rollout mnist` · `python -m bundle rollout mnist --archive new.mar`"
    " · `python -m bundle rollout mnist --archive - < new.mar`"
)
def rollout(
    model: Annotated[str, typer.Argument(help="A model that is served.")],
    archive: Annotated[
        Path | None,
        typer.Option(help="The new archive, - for standard input; by default, built of the model's folder."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the new version, and for the old one's end.")
    ] = 300,
) -> None:
    """Serve a new version of a model in place of the one that is served, without a failed request. Whatever goes wrong,
    the old version goes on."""
    from bundle.server import docker_stack as stack
    from bundle.server.rollout import copy, roll_out

    [folder] = catalog.select([model])
    server = Server()
    running = server.running()
    compose = stack.running_stack() if running is None else None
    if running is None and compose is None:
        raise BundleError("TorchServe is not running. Start it: make serve, or make up")
    with server.lock(), tempfile.TemporaryDirectory(prefix="rollout-") as temporary:
        if archive is None:
            build([folder], Path(temporary))
            archive = Path(temporary) / f"{model}.mar"
        elif str(archive) == "-":
            archive = Path(temporary) / f"{model}.mar"
            archive.write_bytes(sys.stdin.buffer.read())
        if running is None:
            stack.roll_out(compose, model, archive)
            return
        roll_out(server, running.client(), folder, archive, timeout, lambda line: console.print(line, markup=False))
        for record in Path(temporary).glob("*.fingerprint"):  # of what was built here: the next make serve has it
            copy(record, server.store / record.name)
        server.adopt(running, folder)


@app.command(epilog="Examples: `python -m bundle profile mnist` · `python -m bundle profile image --concurrency 16`")
def profile(
    model: Annotated[str, typer.Argument(help="A model that is served.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Clients that ask at a time.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="How long to load the model and watch.")] = 10,
) -> None:
    """Show where a request's time goes: stages, processor time, and a flame graph of a worker (py-spy)."""
    from bundle.load.profile import profile as watch

    [folder] = catalog.select([model])
    server = Server()
    running = server.running()
    if running is None:
        raise BundleError("TorchServe is not running. Start it: make serve")
    with console.status(f"{concurrency} clients ask {model} for {seconds:g} seconds"):
        seen = watch(running, server.settings, folder, concurrency, seconds)
    console.print(seen.table())
    console.print(f"{seen.load.throughput:.0f} requests/s with {concurrency} clients, {seen.load.failed} failed")
    console.print(f"Flame graph of a worker: {relative(seen.graph)}", markup=False)


@app.command()
def stop() -> None:
    """Stop the TorchServe that `serve` started, and its workers."""
    server = Server()
    with server.lock():
        console.print("TorchServe is stopped." if server.stop() else "TorchServe was not running.")


@app.command()
def status() -> None:
    """Show what is served, from the management API. Exits 1 where a worker is missing, 3 where no server runs."""
    server = Server()
    running = server.running()
    if running is None:
        console.print("TorchServe is not running. Start it: make serve")
        raise typer.Exit(3)
    table = Table("model", "version", "workers READY", "min", "max", "batch", "delay ms", "queued")
    healthy = True
    client = running.client()
    for name in client.models():
        model = client.describe(name)
        ready = sum(worker["status"] == "READY" for worker in model["workers"])
        healthy &= ready >= model["minWorkers"]
        queued = model.get("jobQueueStatus", {}).get("pendingRequests", "")
        shown = [model[key] for key in ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay")]
        table.add_row(*map(str, (name, model["modelVersion"], ready, *shown, queued)))
    console.print(table)
    console.print(describe_process(running))
    raise typer.Exit(0 if healthy else 1)


def describe_process(running: Running) -> str:
    process = running.process()
    family = [process, *process.children(recursive=True)]
    memory = sum(member.memory_info().rss for member in family) / 2**30
    return f"PID {running.pid}, {len(family) - 1} child processes, {memory:.1f} GiB resident"


@app.command()
def logs(
    follow: Annotated[bool, typer.Option(help="Go on as lines come, while the server runs.")] = True,
    lines: Annotated[int, typer.Option(help="How many lines to start with.")] = 40,
) -> None:
    """Show the server's and the workers' logs."""
    server = Server()
    files = sorted(server.logs.glob("*.log"))
    if not files:
        raise BundleError("There are no logs yet. Start the server: make serve")
    try:
        subprocess.run(["tail", f"--lines={lines}", *(["-F"] if follow and server.running() else []), *map(str, files)])
    except KeyboardInterrupt:
        pass


@app.command(epilog="Examples: `python -m bundle predict mnist` · `python -m bundle predict image photo.jpg --grpc`")
def predict(
    model: Annotated[str, typer.Argument(help="A model that is served.")],
    file: Annotated[Path | None, typer.Argument(help="What to send; by default, the model's own sample.")] = None,
    grpc: Annotated[bool, typer.Option(help="Over gRPC rather than HTTP.")] = False,
) -> None:
    """Ask a model that is served for one prediction."""
    if file is None:
        [folder] = catalog.select([model])
        if folder.sample_file is None:
            raise BundleError(f"{model} has no sample of its own. Name a file to send.")
        file = folder.sample_file
    if not file.is_file():
        raise BundleError(f"There is no file {file}.")
    running = Server().running()
    if running is None:
        raise BundleError("TorchServe is not running. Start it: make serve")
    if grpc:
        from bundle.server import grpc_client  # imports grpcio, which the other commands need not wait for

        try:
            authorization = keys.header("inference") if (keys := running.keys()) else None
            answer = grpc_client.predict(running.grpc, model, file.read_bytes(), authorization=authorization)
            answer = json.loads(answer)
        except grpc_client.GrpcError as exc:
            raise BundleError(str(exc)) from exc
    else:
        answer = running.client().predict(model, file.read_bytes()).json()
    if "code" in answer:  # over gRPC, TorchServe keeps the body of an error and drops its status
        raise BundleError(f"{model} answered {answer['code']} {answer['type']}: {answer['message']}")
    console.print_json(data=answer)


@app.command(
    "add-model",
    epilog="Example: `python -m bundle add-model birds --serialized model.pt --labels labels.json --image bird.jpg`",
)
def add_model(
    name: Annotated[str, typer.Argument(help="The model's name, and its folder's.")],
    serialized: Annotated[Path, typer.Option(help="The TorchScript file.")],
    labels: Annotated[Path, typer.Option(help='JSON: a list of labels, or {"0": label, ...}.')],
    handler: Annotated[str, typer.Option(help="A file of handlers/, without .py.")] = "image_topk",
    size: Annotated[int | None, typer.Option(help="Pixels of the model's square image; found out by default.")] = None,
    resize: Annotated[int | None, typer.Option(help="Pixels of the shorter side before the square is cut out.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of pixels in [0, 1], a number a channel: 0.5,0.5,0.5")] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    image: Annotated[Path | None, typer.Option(help="A file to try the model with; becomes its sample.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option(help="What else the handler needs: tokenizer.json for text.")
    ] = None,
) -> None:
    """Make a model folder and its archive of a TorchScript file and a label file."""
    from bundle.build.add_model import add_model as add

    added = add(
        name, serialized, labels, handler, size, resize, numbers("mean", mean), numbers("std", std), image, file or (),
        report=lambda line: console.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip
    console.print("Serve it, with the others: make serve")
    console.print(f"Its settings are in {relative(added.path / catalog.CONFIG_NAME)}.")


app.command(epilog=tuning.EXAMPLES)(tuning.tune)
app.command(epilog=supply_chain.EXAMPLES)(supply_chain.keygen)
app.command()(supply_chain.sbom)


def numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return [float(number) for number in text.split(",")] if text else None
    except ValueError as exc:
        raise BundleError(f"--{option} takes numbers with commas between them: 0.5,0.5,0.5") from exc


def main() -> None:
    """Runs a command. What the user can mend is one line on standard error, and exit status 1."""
    logging.getLogger("ts").setLevel(logging.ERROR)  # importing it tells of every accelerator library there is not
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except BundleError as error:
        if error.details:
            errors.print(error.details.strip(), style="dim", markup=False)
        fail(str(error))
    except requests.ConnectionError as error:
        fail(f"no server answers at {error.request.url}. Is it up? make status")
    except requests.RequestException as error:
        fail(f"the server's answer could not be used: {error}")
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or 'no file named'}")


def fail(message: str) -> NoReturn:
    errors.print(f"error: {message}", style="bold red", markup=False, soft_wrap=True)
    sys.exit(1)
