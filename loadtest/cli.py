"""Load tests of what `make serve` serves: locust with a shape, thresholds, and a folder of results."""

import os
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import requests
import typer

from bundle.cli import console
from bundle.cli.console import note
from bundle.cli.parameters import choice, duration
from bundle.errors import BundleError, NotRunning, UsageError
from bundle.server.process import Server
from bundle.server.settings import Settings
from loadtest import shapes, targets, thresholds
from loadtest.errors import LoadTestError

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
RESULTS = Path("build/loadtest")
SECONDS = 30  # for the first answer of a model
STOP_SECONDS = 30  # for answers that are on their way when the run ends: as long as a user waits for one

app = console.program(__doc__)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL[=WEIGHT]",
        help="Folders in models/ and their weights, `mnist=4 text`. By default, all but those served on request.",
    ),
]
Host = Annotated[str | None, typer.Option("--host", "-H", help="The server's URL. By default, that of `make serve`.")]
Shape = Annotated[
    str | None,
    typer.Option(parser=choice(*shapes.SHAPES), metavar="SHAPE", help=f"One of: {', '.join(shapes.SHAPES)}."),
]
Users = Annotated[
    int | None,
    typer.Option(
        "--users", "-u", min=1, help="Most users at the same time. By default, 64, or one for each arrival a second."
    ),
]
Duration = Annotated[
    float, typer.Option("--duration", "-d", parser=duration, metavar="DURATION", help="Of the run: 90s, 5m, 1h30m.")
]
Rate = Annotated[float | None, typer.Option("--rate", "-r", help="Arrivals a second, for the shape `rate`.")]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", "-w", min=0, help="Processes that send requests, beside one that counts. 0: one process does both."
    ),
]
Locust = Annotated[str, typer.Option(help="Further options of locust, as one string.")]


@app.command(
    epilog="Examples: `python -m loadtest run` · `python -m loadtest run mnist --users 64 --duration 60s`"
    " · `python -m loadtest run text=3 image --shape rate --rate 200 --workers 2`"
)
def run(
    models: Models = None,
    shape: Shape = "steps",
    users: Users = None,
    duration: Duration = "60s",
    rate: Rate = None,
    workers: Workers = 0,
    host: Host = None,
    limits: Annotated[
        Path,
        typer.Option(
            "--thresholds", exists=True, dir_okay=False, help="File of limits. If the run misses one, it exits with 1."
        ),
    ] = thresholds.FILE,
    results: Annotated[
        Path | None, typer.Option(help=f"Folder of the results; by default, a new one in {RESULTS}.")
    ] = None,
    locust: Locust = "",
) -> None:
    """Run without a browser: a progress line, a verdict, and results in a folder.

    Exit with 0 if every threshold is met, 1 if one is missed, 2 for an invalid argument, 3 if no server answers with
    these models, 130 after Ctrl-C.
    """
    environment = settings(models, shape=shape, users=users, duration=f"{duration}s", rate=rate, thresholds=limits)
    url = served(environment, host)
    results = results or RESULTS / datetime.now().strftime("%Y%m%d-%H%M%S")
    if results.exists() and any(results.iterdir()):
        raise UsageError(f"{results} holds the results of another run. Choose another folder, or delete it.")
    results.mkdir(parents=True, exist_ok=True)
    note(f"Results: {results}")
    start(
        environment,
        *("--headless", "--skip-log-setup", "--host", url, "--stop-timeout", f"{STOP_SECONDS}"),
        *("--csv", f"{results / 'run'}", "--html", f"{results / 'report.html'}"),
        *distribution(workers),
        *shlex.split(locust),
    )


@app.command(epilog="Examples: `python -m loadtest ui` · `python -m loadtest ui mnist --port 8090 --shape spike`")
def ui(
    models: Models = None,
    shape: Shape = None,
    users: Users = None,
    duration: Duration = "60s",
    rate: Rate = None,
    workers: Workers = 0,
    host: Host = None,
    port: Annotated[int, typer.Option(help="Port of the web interface, on loopback.")] = 8089,
    locust: Locust = "",
) -> None:
    """Start locust's web interface; without a shape, it asks for the number of users."""
    environment = settings(models, shape=shape, users=users, duration=f"{duration}s", rate=rate)
    url = served(environment, host)
    note(f"Open http://127.0.0.1:{port} (Ctrl-C ends it).")
    web = ("--web-host", "127.0.0.1", "--web-port", f"{port}", "--stop-timeout", f"{STOP_SECONDS}")
    start(environment, "--host", url, *web, *distribution(workers), *shlex.split(locust))


@app.command(epilog="Example: `python -m loadtest plot build/loadtest/20260101-120000`")
def plot(results: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of results.")]) -> None:
    """Draw the picture of a run again, from its record."""
    from loadtest import plot as drawing
    from loadtest.record import Record

    file = results / "run_record.json"
    if not file.is_file():
        raise UsageError(f"There is no {file}. Name a folder of results in {RESULTS}.")
    for written in drawing.write(Record.load(file), results / "run"):
        print(written)


def settings(models: list[str] | None, **wishes: object) -> dict[str, str]:
    """Return the environment that the locustfile reads, once it is checked.

    Raises:
        UsageError: a value is invalid.
    """
    wished = {name.upper(): "" if value is None else str(value) for name, value in wishes.items()}
    wished["MODELS"] = " ".join(models or [])
    try:
        chosen = targets.choose(wished["MODELS"])
        shapes.Load.parse(wished, len(chosen))
        if "THRESHOLDS" in wished:
            thresholds.read(Path(wished["THRESHOLDS"]), set(targets.sections()))
    except LoadTestError as exc:
        raise UsageError(f"{exc}.") from exc
    return wished


def served(environment: dict[str, str], host: str | None) -> str:
    """Return the server's URL, once every model to ask has answered there.

    Raises:
        NotRunning: no server answers, or it does not serve a model.
        BundleError: a model does not answer.
    """
    running = Server().running()
    url = (host or (running.inference if running else Settings().url("inference_address"))).rstrip("/")
    if running and url == running.inference and running.key_file:
        raise UsageError("The server asks for tokens, which locust does not send. Serve without tokens.")
    with requests.Session() as session:
        session.trust_env = False  # a proxy for the internet knows nothing of this machine's loopback
        for target in targets.choose(environment["MODELS"]):
            try:
                answer = session.post(f"{url}/predictions/{target.name}", data=target.sample, timeout=SECONDS)
            except requests.ConnectionError as exc:
                raise NotRunning(f"No server answers at {url}. Start one: make serve") from exc
            except requests.RequestException as exc:
                raise BundleError(f"{target.name} does not answer at {url}: {exc}") from exc
            if answer.status_code == 404:
                raise NotRunning(
                    f"{target.name} is not served at {url}. Serve it (make serve MODELS=...), "
                    "or name those that are (make loadtest MODELS=...)"
                )
    return url


def distribution(workers: int) -> list[str]:
    """Return locust's options for processes on this machine, which meet on a free port of loopback."""
    if not workers:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    master = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers-max-wait", "60"]
    return [*master, "--processes", str(workers), "--master-host", "127.0.0.1", "--master-port", port]


def start(environment: dict[str, str], *options: str) -> NoReturn:
    """Become locust, which handles signals and sets the exit status itself."""
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), *options]
    os.execve(sys.executable, command, os.environ | environment)


def main() -> None:
    """Run the program."""
    console.run(app, "python -m loadtest")
