"""Load tests of the running server: locust with load shapes, thresholds, and a folder of results."""

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
from bundle.cli.parameters import choice
from bundle.errors import BundleError, NotRunning, UsageError
from bundle.server.http import Session, Untrusted
from bundle.server.process import Server
from bundle.server.settings import Settings
from loadtest import shapes, targets, thresholds
from loadtest.errors import LoadTestError

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
RESULTS = Path("build/loadtest")
SECONDS = 30  # limit for the first answer of a model
STOP_SECONDS = 30  # limit for the last answers when the run ends; locustfile.py has the same limit for every answer

app = console.program(__doc__)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL[=WEIGHT]",
        help="Model folders with weights: `mnist=4 text`. By default, all except those served on request.",
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
        "--users",
        "-u",
        min=1,
        help="Maximum number of simultaneous users. By default 64, or for `rate` one per request a second.",
    ),
]
Duration = Annotated[
    str, typer.Option("--duration", "-d", metavar="DURATION", help="Length of the run: 90s, 5m, 1h30m.")
]
Rate = Annotated[float | None, typer.Option("--rate", "-r", help="Requests a second, for the shape `rate`.")]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        "-w",
        min=0,
        help="Number of processes that send requests, besides the one that counts. 0: one process does both.",
    ),
]
Locust = Annotated[str, typer.Option(help="More options for locust, as one string.")]


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
            "--thresholds",
            exists=True,
            dir_okay=False,
            help="YAML file of thresholds. A missed one makes the run exit with 1.",
        ),
    ] = thresholds.FILE,
    results: Annotated[
        Path | None, typer.Option(help=f"Folder for the results. By default, a new one in {RESULTS}.")
    ] = None,
    locust: Locust = "",
) -> None:
    """Run in the terminal: show progress and a verdict, and write the results into a folder.

    Exit with 0 if every threshold is met, 1 if one is missed, 2 for an invalid argument, 3 if no server answers with
    these models, 130 after Ctrl-C.
    """
    environment = settings(models, shape=shape, users=users, duration=duration, rate=rate, thresholds=limits)
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
    port: Annotated[int, typer.Option(help="Port of the web interface on 127.0.0.1.")] = 8089,
    locust: Locust = "",
) -> None:
    """Start locust's web interface. Without a shape, set the number of users there."""
    environment = settings(models, shape=shape, users=users, duration=duration, rate=rate)
    url = served(environment, host)
    note(f"Open http://127.0.0.1:{port} (press Ctrl-C to stop).")
    web = ("--web-host", "127.0.0.1", "--web-port", f"{port}", "--stop-timeout", f"{STOP_SECONDS}")
    start(environment, "--host", url, *web, *distribution(workers), *shlex.split(locust))


@app.command(epilog="Example: `python -m loadtest plot build/loadtest/20260101-120000`")
def plot(results: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the results of a run.")]) -> None:
    """Redraw the chart of a run from its record."""
    from loadtest import plot as drawing
    from loadtest.record import Record

    file = results / "run_record.json"
    if not file.is_file():
        raise UsageError(f"{file} is missing. Name a folder in {RESULTS} that has the results of a run.")
    for written in drawing.write(Record.load(file), results / "run"):
        print(written)


def settings(models: list[str] | None, **options: object) -> dict[str, str]:
    """Check the options and return them as the environment variables that the locustfile reads.

    Raises:
        UsageError: a value is invalid.
    """
    environment = {name.upper(): "" if value is None else str(value) for name, value in options.items()}
    environment["MODELS"] = " ".join(models or [])
    try:
        chosen = targets.choose(environment["MODELS"])
        shapes.Load.parse(environment, len(chosen))
        if "THRESHOLDS" in environment:
            thresholds.read(Path(environment["THRESHOLDS"]), targets.known_models())
    except LoadTestError as exc:
        raise UsageError(f"{exc}.") from exc
    return environment


def served(environment: dict[str, str], host: str | None) -> str:
    """Return the server's URL after every model to test has answered there.

    Raises:
        NotRunning: no server answers, or it does not serve one of the models.
        UsageError: the server requires tokens.
        BundleError: a model does not answer, or the server's certificate is not trusted.
    """
    running = Server().running()
    url = (host or (running.inference if running else Settings().url("inference_address"))).rstrip("/")
    if running and url == running.inference and running.key_file:
        raise UsageError("The server requires tokens, which locust does not send. Start the server without tokens.")
    with Session() as session:
        for target in targets.choose(environment["MODELS"]):
            try:
                answer = session.post(f"{url}/predictions/{target.name}", data=target.sample, timeout=SECONDS)
            except Untrusted:
                raise
            except requests.ConnectionError as exc:
                raise NotRunning(f"No server answers at {url}. Start one: make serve") from exc
            except requests.RequestException as exc:
                raise BundleError(f"{target.name} does not answer at {url}: {exc}") from exc
            if answer.status_code == 404:
                raise NotRunning(
                    f"{target.name} is not served at {url}. Serve it (make serve MODELS={target.name}), "
                    "or test other models (make loadtest MODELS=...)"
                )
    return url


def distribution(workers: int) -> list[str]:
    """Return locust's options for worker processes, which reach their master on a free port of 127.0.0.1."""
    if not workers:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    master = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers-max-wait", "60"]
    return [*master, "--processes", str(workers), "--master-host", "127.0.0.1", "--master-port", port]


def start(environment: dict[str, str], *options: str) -> NoReturn:
    """Replace this process with locust, which handles signals and sets the exit status itself."""
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), *options]
    os.execve(sys.executable, command, os.environ | environment)


def main() -> None:
    """Run the program."""
    console.run(app, "python -m loadtest")
