"""The command that sends inputs to a model: one, whose answer it shows, or many, with one JSON line each."""

import json
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bundle.cli.console import ENDING, console, note, opening, progress, state_columns
from bundle.cli.parameters import Model, Patience
from bundle.cli.serve import NOT_RUNNING
from bundle.errors import BundleError, NotRunning, UsageError

if TYPE_CHECKING:
    from bundle.bulk.inputs import Source
    from bundle.bulk.record import Record
    from bundle.server.client import Client
    from bundle.server.process import Running

app = typer.Typer()
REFRESH_SECONDS = 0.2  # of the progress bar
PREDICTIONS = 64  # requests at the same time


@app.command(
    epilog="Examples: `bundle predict mnist` · `bundle predict image photo.jpg --option top_k=1`"
    " · `bundle predict image photos --output answers.jsonl` · `bundle predict text - --lines < questions.txt`"
    " · `bundle predict text requests.jsonl --jsonl --output answers.jsonl --resume`"
)
def predict(
    model: Model,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|FOLDER|-]...",
            help="The inputs; `-` for their names on standard input, one in each line. By default, the sample in the "
            "model's folder.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the JSON lines. By default, standard output.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the output of an earlier run: send what is missing, or may succeed this time."
        ),
    ] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help='Each line of FILE or - is a JSON request, which may have an "id".')
    ] = False,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of FILE or - is a text.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the model, such as top_k=3. May be repeated."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Ask for explanations instead of predictions.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            min=1,
            max=1024,
            help="Requests at the same time, for many inputs. By default, 64; for explanations, one for each worker.",
        ),
    ] = None,
    patience: Annotated[float, Patience] = "2m",  # type: ignore[assignment]  # Typer parses the default, too
    grpc: Annotated[bool, typer.Option("--grpc", help="Send one file over gRPC instead of HTTP.")] = False,
) -> None:
    """Send inputs to a model.

    The answer to one file is printed as it is. Several files, a folder, `-`, `--jsonl`, `--lines` and `--output` make a
    run: it writes one JSON line for each input, as soon as it is answered or has failed. Progress goes to standard
    error.

    Exit with 0 if all inputs are answered, with 1 if one has failed, with 3 if no server is running or it does not
    serve the model.
    """
    options = dict(pair(text) for text in option or [])
    places = inputs or []
    for place in places:
        if place != "-" and not Path(place).exists():
            raise UsageError(f"File {place!r} does not exist.")
    if output or resume or jsonl or lines or len(places) > 1 or any(p == "-" or Path(p).is_dir() for p in places):
        if grpc:
            raise UsageError("--grpc sends one file: leave it out.")
        predict_all(model, source(places, jsonl, lines, output), resume, options, explain, concurrency, patience)
        return
    if grpc and (options or explain):
        raise UsageError("--grpc sends no options and asks for no explanations: leave it out.")
    file = Path(places[0]) if places else sample_of(model)
    console.print_json(data=(ask_grpc if grpc else ask)(model, file, options, explain))


def pair(text: str) -> tuple[str, str]:
    """Parse an option of a model."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"{text!r} is not an option like top_k=3.")
    return name, value


def source(places: list[str], jsonl: bool, lines: bool, output: Path | None) -> "Source":
    """Check what is to be sent.

    Raises:
        UsageError: arguments are missing, or contradict each other.
    """
    from bundle.bulk.inputs import Source

    if jsonl and lines:
        raise UsageError("A line is either a JSON request (--jsonl) or a text (--lines): choose one.")
    if not places:
        raise UsageError("Name the inputs: files, folders, or - for standard input.")
    if (jsonl or lines) and (len(places) > 1 or Path(places[0]).is_dir()):
        form = "--jsonl" if jsonl else "--lines"
        raise UsageError(f"{form} reads one file. For several: cat FILE ... | bundle predict MODEL - {form}")
    return Source(places, "jsonl" if jsonl else "lines" if lines else "files", output)


# --- one input --------------------------------------------------------------------------------------------------


def sample_of(model: str) -> Path:
    """Return the sample in a model's folder.

    Raises:
        UsageError: there is no such folder, or it has no sample.
    """
    from bundle import catalog
    from bundle.paths import models_dir, relative

    samples = {folder.name: folder.sample_file for folder in catalog.folders() if folder.sample_file}
    if model not in samples:
        there = ", ".join(samples) or "none"
        raise UsageError(
            f"There is no sample of {model} in {relative(models_dir())}/; there are samples of: {there}. "
            f"To send a file of yours: bundle predict {model} FILE"
        )
    return samples[model]


def server() -> "Running":
    """Return the server that `bundle serve` started.

    Raises:
        NotRunning: it does not run.
    """
    from bundle.server.process import Server

    running = Server().running()
    if running is None:
        raise NotRunning(NOT_RUNNING)
    return running


def ask(model: str, file: Path, options: dict[str, str], explain: bool) -> object:
    """Return the answer to a file over HTTP.

    Raises:
        NotRunning: no server runs, or it does not serve the model.
        BundleError: the answer is an error, or not JSON.
    """
    from bundle.samples import headers

    with opening(file):
        content = file.read_bytes()
    client = server().client()
    return checked(client, model, client.predict(model, content, None, headers(file), options, explain).content)


def ask_grpc(model: str, file: Path, *_: object) -> object:
    """Return the answer to a file over gRPC.

    Raises:
        NotRunning: no server runs, or it does not serve the model.
        BundleError: the answer is an error, or not JSON; or the file is not the JSON that its name promises.
    """
    from bundle.samples import grpc_fields

    try:
        with opening(file):
            fields = grpc_fields(file)
    except ValueError as exc:
        raise UsageError(f"{file} is not valid JSON: {exc}") from exc
    running = server()
    from bundle.server import grpc_client  # imports grpcio, which HTTP need not wait for
    from bundle.server.client import UNKNOWN_MODEL

    client = running.client()
    try:
        authorization = keys.header("inference") if (keys := running.keys()) else None
        return checked(client, model, grpc_client.predict(running.grpc, model, fields, authorization=authorization))
    except grpc_client.GrpcError as exc:
        if any(kind in exc.details for kind in UNKNOWN_MODEL):
            raise client.not_served(model) from exc
        raise BundleError(str(exc)) from exc


def checked(client: "Client", model: str, body: bytes) -> object:
    """Return an answer.

    Raises:
        NotRunning: the model is not served.
        BundleError: the answer is an error, or not JSON.
    """
    from bundle.server.client import UNKNOWN_MODEL

    try:
        answer = json.loads(body)
    except ValueError as exc:
        raise BundleError(f"{model} answered {len(body)} bytes that are not JSON.") from exc
    # over gRPC, TorchServe keeps the body of an error and drops its status
    if isinstance(answer, dict) and answer.keys() >= {"code", "type", "message"}:
        if answer["type"] in UNKNOWN_MODEL:
            raise client.not_served(model)
        raise BundleError(f"{model} answered {answer['code']} {answer['type']}: {answer['message']}")
    return answer


# --- many inputs ------------------------------------------------------------------------------------------------


def predict_all(
    model: str,
    source: "Source",
    resume: bool,
    options: dict[str, str],
    explain: bool,
    concurrency: int | None,
    patience: float,
) -> None:
    """Send all inputs of a source, and write their lines.

    Args:
        concurrency: by default, `PREDICTIONS`, or as many explanations as the model has workers.

    Raises:
        NotRunning: the server does not run, or does not serve the model; or it has not answered for too long.
        typer.Exit: with 1: an input has failed.
    """
    from bundle.bulk.record import recording
    from bundle.bulk.sender import Sender
    from bundle.server.client import path
    from bundle.server.http import check_certificate

    output = source.output
    if resume and output is None:
        raise UsageError("--resume continues a file: name it with --output.")
    client = server().client()
    check_certificate(client.inference)
    described = client.describe(model)
    if described is None:
        raise client.not_served(model)
    if concurrency is None:
        # a worker explains one input after the other, and all of its batch within max_explain_seconds: those that come
        # with others are not faster, and are rejected when the others have taken the time
        concurrency = max(1, len(described["workers"])) if explain else PREDICTIONS
    sender = Sender(client, path(model, explain=explain), options, concurrency, patience)
    with recording(output, resume) as record:
        began = time.monotonic()
        try:
            with shown(record, source) as show:

                def finish(name: dict[str, object], outcome: object) -> None:
                    record.write(name, outcome)
                    show()

                missing = (item for item in source.inputs() if not record.has(item.name))
                run(sender.send(missing, finish))
        except BaseException:
            note(summary(record, began))
            if output:
                note(f"The run is not complete. To continue it, add --resume; {output} has what is finished.")
            raise
    note(summary(record, began))
    if record.failed:
        raise typer.Exit(1)


def run(sending: Coroutine[object, object, None]) -> None:
    """Run a coroutine; SIGTERM and SIGHUP cancel it, as Ctrl-C does.

    The usual handler would raise its KeyboardInterrupt inside any task, and asyncio would print it.
    """
    import asyncio
    import signal

    usual = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}

    async def cancellable() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task

        def end(number: signal.Signals) -> None:
            with suppress(KeyboardInterrupt):
                usual[number](number, None)
            task.cancel()

        for number in usual:
            loop.add_signal_handler(number, end, number)
        await sending

    try:
        asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def shown(record: "Record", source: "Source") -> Iterator[Callable[[], None]]:
    """Show a bar over the inputs; yield what updates it. Lines that are printed on a terminal need no bar."""
    if source.output is None and console.is_terminal:
        yield lambda: None
        return
    from rich.progress import TimeRemainingColumn

    with progress(*state_columns(), TimeRemainingColumn()) as bars:
        total = source.count()
        task = bars.add_task("predict", total=total, completed=record.earlier, state="")
        due = 0.0

        def show(at_once: bool = False) -> None:
            nonlocal due
            if at_once or time.monotonic() > due:  # a bar that moves with each answer would take a fifth of the time
                due = time.monotonic() + REFRESH_SECONDS
                finished = record.answered + record.failed
                state = f"{finished:,}" + (f"/{total:,}" if total is not None else "") + f", {record.failed:,} failed"
                bars.update(task, completed=finished, state=state)

        yield show
        show(at_once=True)


def summary(record: "Record", began: float) -> str:
    """Return what the run did, in a line.

    Args:
        began: time.monotonic() seconds.
    """
    seconds = time.monotonic() - began
    sent = record.answered + record.failed - record.earlier
    before = f", {record.earlier:,} of them before" if record.earlier else ""
    speed = f"{sent:,} in {seconds:.1f} s, {sent / max(seconds, 0.001):.0f}/s" if sent else "nothing was left to send"
    return f"{record.answered:,} answered, {record.failed:,} failed{before}; {speed}"
