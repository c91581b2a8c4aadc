"""Load tests of what `make serve` serves: locust with a shape, thresholds, and a folder of results."""

import logging
import os
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import requests
import typer
from rich.console import Console

from bundle.errors import BundleError
from bundle.server.process import Server
from bundle.server.settings import Settings
from loadtest import shapes, targets, thresholds
from loadtest.errors import LoadTestError

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
RESULTS = Path("build/loadtest")
SECONDS = 30  # for the first answer of a model
STOP_SECONDS = 30  # for answers that are on their way when the run ends: as long as a user waits for one

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode="markdown")
errors = Console(stderr=True, highlight=False)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Folders in models/ and their weights, `mnist=4 text`; by default, all that are always served."
    ),
]
Host = Annotated[str | None, typer.Option(help="The server; by default, where `make serve` has it.")]
Shape = Annotated[str | None, typer.Option(help=f"One of: {', '.join(shapes.SHAPES)}.")]
Users = Annotated[int | None, typer.Option(help="At most so many at a time; 64, or what RATE needs.")]
Duration = Annotated[str, typer.Option(help="90s, 5m, 1h30m.")]
Rate = Annotated[float | None, typer.Option(help="Arrivals a second, of the shape `rate`.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that make the load, beside one that counts; 0: one does both.")
]
Locust = Annotated[str, typer.Option(help="Further options of locust, as it has them.")]


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
        Path, typer.Option("--thresholds", help="File of what the run must hold, or it exits with 1.")
    ] = thresholds.FILE,
    results: Annotated[
        Path | None, typer.Option(help=f"Folder of the results; by default, a new one in {RESULTS}.")
    ] = None,
    locust: Locust = "",
) -> None:
    """Run without a browser: a progress line, a verdict, and results in a folder; exit with 1 past a threshold."""
    environment = settings(models, shape=shape, users=users, duration=duration, rate=rate, thresholds=limits)
    url = served(environment, host)
    results = results or RESULTS / datetime.now().strftime("%Y%m%d-%H%M%S")
    if results.exists() and any(results.iterdir()):
        raise LoadTestError(f"{results} holds the results of another run: choose another, or delete it")
    results.mkdir(parents=True, exist_ok=True)
    print(f"Results: {results}", flush=True)
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
    port: Annotated[int, typer.Option(help="Of the web interface, on loopback.")] = 8089,
    locust: Locust = "",
) -> None:
    """Start locust's web interface; without a shape, it asks for the number of users."""
    environment = settings(models, shape=shape, users=users, duration=duration, rate=rate)
    url = served(environment, host)
    print(f"Open http://127.0.0.1:{port} (Ctrl-C ends it).", flush=True)
    web = ("--web-host", "127.0.0.1", "--web-port", f"{port}", "--stop-timeout", f"{STOP_SECONDS}")
    start(environment, "--host", url, *web, *distribution(workers), *shlex.split(locust))


@app.command(epilog="Example: `python -m loadtest plot build/loadtest/20260101-120000`")
def plot(results: Annotated[Path, typer.Argument(help="A folder of results.")]) -> None:
    """Draw the picture of a run again, out of its record."""
    from loadtest import plot as drawing
    from loadtest.record import Record

    file = results / "run_record.json"
    if not file.is_file():
        raise LoadTestError(f"there is no {file}: name a folder of results in {RESULTS}")
    for written in drawing.write(Record.load(file), results / "run"):
        print(written)


def settings(models: list[str] | None, **wishes: object) -> dict[str, str]:
    """The environment that the locustfile reads; checked, so that nothing is started in vain.

    Raises:
        LoadTestError: it is not one.
    """
    wished = {name.upper(): "" if value is None else str(value) for name, value in wishes.items()}
    wished["MODELS"] = " ".join(models or [])
    chosen = targets.choose(wished["MODELS"])
    shapes.Load.parse(wished, len(chosen))
    if "THRESHOLDS" in wished:
        thresholds.read(Path(wished["THRESHOLDS"]), set(targets.sections()))
    return wished


def served(environment: dict[str, str], host: str | None) -> str:
    """Where the server is; every model to ask has answered there.

    Raises:
        LoadTestError: no server answers, or it does not have a model.
    """
    running = Server().running()
    url = (host or (running.inference if running else Settings().url("inference_address"))).rstrip("/")
    if running and url == running.inference and running.key_file:
        raise LoadTestError("the server asks for keys, which locust is not given: serve without tokens")
    with requests.Session() as session:
        session.trust_env = False  # a proxy for the internet knows nothing of this machine's loopback
        for target in targets.choose(environment["MODELS"]):
            try:
                answer = session.post(f"{url}/predictions/{target.name}", data=target.sample, timeout=SECONDS)
            except requests.ConnectionError as exc:
                raise LoadTestError(f"no server answers at {url}. Start one: make serve") from exc
            except requests.RequestException as exc:
                raise LoadTestError(f"{target.name} does not answer at {url}: {exc}") from exc
            if answer.status_code == 404:
                raise LoadTestError(
                    f"{target.name} is not served at {url}. Serve it (make serve MODELS=...), "
                    "or name those that are (make loadtest MODELS=...)"
                )
    return url


def distribution(workers: int) -> list[str]:
    """Locust's options for processes on this machine, which meet on a free port of loopback."""
    if not workers:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    master = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--expect-workers-max-wait", "60"]
    return [*master, "--processes", str(workers), "--master-host", "127.0.0.1", "--master-port", port]


def start(environment: dict[str, str], *options: str) -> NoReturn:
    """Becomes locust: signals and the exit status are its own."""
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), *options]
    os.execve(sys.executable, command, os.environ | environment)


def main() -> None:
    """Runs a command. What the user can mend is one line on standard error, and exit status 2."""
    logging.getLogger("ts").setLevel(logging.ERROR)  # importing it tells of every accelerator library there is not
    try:
        app()
    except (LoadTestError, BundleError) as error:
        errors.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
