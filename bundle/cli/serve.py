"""The commands that operate a server: start and stop it, look at it, supervise it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bundle.cli.build import build
from bundle.cli.console import console, note, opening, progress
from bundle.cli.parameters import Models, Timeout, address, worker_count
from bundle.errors import BundleError, NotRunning, UsageError

if TYPE_CHECKING:
    from bundle.catalog import ModelFolder
    from bundle.server.client import WorkerCount
    from bundle.server.process import Running, Server

app = typer.Typer()
NOT_RUNNING = "TorchServe is not running. Start it: make serve"


@app.command(
    epilog="Examples: `bundle serve` · `bundle serve mnist text`"
    " · `TS_INFERENCE_ADDRESS=http://127.0.0.1:9080 bundle serve`"
)
def serve(models: Models = None, timeout: Annotated[float, Timeout] = 300) -> None:
    """Build the archives, start TorchServe, and return when every model works.

    Only archives that are out of date are built. A model works when its workers are READY and it has answered its own
    sample correctly. The server stays in the background: `bundle stop` ends it.

    A server that runs gets models that are new. It is restarted if anything else has changed: a setting, an archive, or
    which of its models to serve.
    """
    from bundle import catalog
    from bundle.paths import relative
    from bundle.server.bring_back import bring_back
    from bundle.server.client import curl_lines
    from bundle.server.process import Server
    from bundle.server.restart import restart_reason
    from bundle.server.rollout import add

    folders = catalog.select(models or [])
    server = Server()
    server.settings.check()
    make_run_folder(server)
    with server.lock():
        build(folders, server.store)
        running = server.running()
        if running and (reason := restart_reason(server, running, folders)):
            server.check(folders)  # before the running server is stopped
            try_samples(server, running, folders)
            note(f"{reason} It is restarted.")
            server.stop()
            running = None
        if running is None:
            running = start(server, folders, timeout)
            console.print(f"TorchServe is up: PID {running.pid}, logs in {relative(server.logs)}.")
        else:
            client, new = running.client(), [folder for folder in folders if folder.name not in running.served]
            for folder in new:
                add(server, client, folder, timeout, note)
                running = server.adopt(running, folder)
            missing = [folder for folder in folders if bring_back(server, client, folder, timeout, note)]
            wait_until_serving(server, running, folders, timeout)
            changes = [f"added: {names(new)}"] if new else []
            changes += [f"served again: {names(missing)}"] if missing else []
            console.print(f"Already served by PID {running.pid}; {'; '.join(changes) or 'nothing has changed'}.")
    console.print("\nTry:")
    for line in curl_lines(running.client(), folders):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print("or in a browser: make page")


def names(folders: list["ModelFolder"]) -> str:
    return ", ".join(folder.name for folder in folders)


def make_run_folder(server: "Server") -> None:
    """Make the folder of the server's record.

    Raises:
        BundleError: RUN_DIR names a folder that cannot be made.
    """
    with opening(server.run_dir):
        server.run_dir.mkdir(parents=True, exist_ok=True)


def try_samples(server: "Server", running: "Running", folders: list["ModelFolder"]) -> None:
    """Try the archives that the running server does not have on their own samples.

    Raises:
        BundleError: one cannot be loaded, or does not answer its sample as the folder expects.
    """
    digests = server.archive_digests(folders)
    new = [folder for folder in folders if running.served.get(folder.name) != digests[folder.name]]
    if new:
        from bundle.cli.own_sample import try_own_sample  # imports torch, which takes seconds

        for folder in new:
            try_own_sample(server.archive(folder), folder)


def start(server: "Server", folders: list["ModelFolder"], timeout: float) -> "Running":
    """Start the server and wait until it serves. After any failure, Ctrl-C included, nothing is left running."""
    from bundle.setup.torch_source import unused_gpu

    if line := unused_gpu():
        note(line)
    running = server.start(folders)
    try:
        wait_until_serving(server, running, folders, timeout)
    except BaseException:
        server.stop()
        raise
    return running


def wait_until_serving(server: "Server", running: "Running", folders: list["ModelFolder"], timeout: float) -> None:
    """Wait until every model's workers are READY, then have each model answer its own sample."""
    from bundle.server.client import check_sample
    from bundle.server.readiness import wait_until_ready

    with progress() as bars:
        tasks = {folder.name: bars.add_task(f"start {folder.name}", total=1, state="") for folder in folders}

        def show(name: str, count: "WorkerCount") -> None:
            state = f"{count.ready}/{count.wanted} workers READY"
            bars.update(tasks[name], total=count.wanted, completed=count.ready, state=state)

        wait_until_ready(server, running, folders, timeout, show)
    for folder in folders:
        first = check_sample(running.client(), folder)
        if first is not None:
            expected = ", as expected" if folder.bundle.expect else ""
            note(f"  {folder.name}: {folder.bundle.sample} is {first!r}{expected}")


@app.command(epilog="Example: `bundle stop`")
def stop() -> None:
    """Stop the server that `bundle serve` started, and its workers."""
    from bundle.server.process import Server

    server = Server()
    make_run_folder(server)
    with server.lock():
        console.print("TorchServe is stopped." if server.stop() else "TorchServe was not running.")


@app.command(epilog="Examples: `bundle status` · `bundle status --json`")
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show the models that are served, their versions and workers.

    Exit with 0 if every worker is there, with 1 if one is missing, with 3 if no server is running.
    """
    from bundle.server import frontend
    from bundle.server.process import Server
    from bundle.server.status import status_of

    server = Server()
    running = server.running()
    if running is None:
        if as_json:
            console.print_json(data={"running": False})
            raise typer.Exit(NotRunning.status)
        raise NotRunning(NOT_RUNNING)
    seen = status_of(running, frontend.states(server.console))
    if as_json:
        console.print_json(data=seen.as_dict())
    else:
        console.print(seen.table())
        console.print(seen.process())
        console.print(seen.frontend(), soft_wrap=True, markup=False)
        if missing := seen.missing():
            raise BundleError(f"{missing} They may be starting. See the log: make logs")
    raise typer.Exit(0 if seen.healthy else 1)


@app.command(epilog="Examples: `bundle logs` · `bundle logs --no-follow --lines 200`")
def logs(
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", "-f", help="Show new lines until Ctrl-C, while the server runs.")
    ] = True,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines to start with.")] = 40,
) -> None:
    """Show the logs of the server and its workers."""
    import subprocess

    from bundle.server.process import Server

    server = Server()
    files = sorted(server.logs.glob("*.log"))
    if not files:
        raise NotRunning("There are no logs: no server was started here. Start one: make serve")
    following = ["-F"] if follow and server.running() else []
    subprocess.run(["tail", f"--lines={lines}", *following, *map(str, files)])


@app.command(epilog="Examples: `bundle page` · `bundle page --port 7861 --host 0.0.0.0`")
def page(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    browser: Annotated[
        bool | None, typer.Option(help="Open a browser. By default, if there is a display.", show_default=False)
    ] = None,
) -> None:
    """Open a page on which a person tries the served models, until Ctrl-C.

    It needs an environment of its own, which `make page` makes.
    """
    import os

    from bundle.paths import ROOT
    from bundle.server.process import Server

    server = Server()
    if server.running() is None:
        raise NotRunning(NOT_RUNNING)
    environment = ROOT / ".venv-page"
    if not (environment / "page.done").is_file():  # missing, or its installation did not end
        raise BundleError("The page's environment .venv-page is missing. Make it: make page")
    if browser is None:
        browser = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    python = environment / "bin" / "python"
    # -P: a file page.py in the current folder is not the page
    command = [str(python), "-P", "-m", "page", "--host", host, "--port", str(port)]
    command += ["--record", str(server.record), "--files", str(server.run_dir / "page")]
    command += ["--browser"] if browser else []
    os.execve(python, command, {**os.environ, "PYTHONPATH": str(ROOT)})


@app.command(
    epilog="Examples: `bundle run` · `bundle run mnist --workers mnist=4 --address 0.0.0.0:8083`"
    " · `bundle run mnist --state state.json`"
)
def run(
    models: Models = None,
    address: Annotated[
        tuple,
        typer.Option(
            envvar="BUNDLE_ADDRESS",
            parser=address,
            metavar="HOST:PORT",
            help="Address of the supervisor's /metrics, /ready and /live.",
        ),
    ] = "127.0.0.1:8083",  # type: ignore[assignment]  # Typer parses the default, too
    state: Annotated[
        Path | None, typer.Option(envvar="BUNDLE_STATE", help="File that keeps what the management API changed.")
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(envvar="BUNDLE_GATE", help="Folder of files that tell the proxy whether this server serves."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(envvar="BUNDLE_REPLICAS", min=1, help="Number of servers that serve the same behind the proxy."),
    ] = None,
    archives: Annotated[
        Path | None,
        typer.Option(envvar="BUNDLE_ARCHIVES", help="Folder of archives to copy into the store, each once."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(envvar="BUNDLE_START_SECONDS", min=0, help="Seconds to wait until every worker is READY.")
    ] = 300,
    patience: Annotated[
        float,
        typer.Option(
            envvar="BUNDLE_PATIENCE_SECONDS", min=0, help="Seconds that a model may lack workers before this ends."
        ),
    ] = 120,
    drain: Annotated[
        float,
        typer.Option(
            envvar="BUNDLE_DRAIN_SECONDS", min=0, help="Seconds to wait for requests in flight before the end."
        ),
    ] = 90,
    workers: Annotated[
        list[str] | None,
        typer.Option(
            envvar="BUNDLE_WORKERS",
            metavar="MODEL=N",
            help="Number of a model's workers instead of that in its archive. May be repeated; in the variable, with "
            "spaces between.",
        ),
    ] = None,
) -> None:
    """Run TorchServe in the foreground, as a container's first process.

    It serves the archives that exist. SIGTERM drains it. It exits with 1 when TorchServe dies or a model's workers do
    not come back, so that a restart policy replaces it.
    """
    from bundle import catalog
    from bundle.server.process import Server
    from bundle.supervisor.supervisor import Options, Supervisor, install_archives

    server = Server()
    selected = catalog.select(models or [])
    if archives:
        install_archives(archives, server.store, {folder.name for folder in selected}, say)
    folders = [folder for folder in selected if models or server.archive(folder).is_file()]
    places = f"{server.store} or {archives}" if archives else str(server.store)
    if missing := [folder.name for folder in folders if not server.archive(folder).is_file()]:
        raise BundleError(f"There is no archive of {', '.join(missing)} in {places}. Build it: make archive")
    if not folders:
        raise BundleError(f"There are no archives in {places}. Build them: make archive")
    counts = dict(map(worker_count, workers or []))
    if unserved := counts.keys() - {folder.name for folder in folders}:
        raise UsageError(f"--workers names {min(unserved)}, which is not served here.")
    make_run_folder(server)
    with server.lock():
        server.stop()  # what a killed predecessor may have left
    host, port = address
    options = Options(host, port, state, gate, replicas, timeout, patience, drain, counts)
    Supervisor(server, options, say).run(folders, start)


def say(line: str) -> None:
    """Print a line of a container's log, at once and without wrapping."""
    print(f"bundle: {line}", flush=True)
