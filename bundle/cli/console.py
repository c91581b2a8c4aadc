"""What every program of this repository shares: two consoles, one progress bar, one way to end.

Results go to standard output, so that they can be piped. Everything else goes to standard error: progress, notes,
errors.

Exit status: 0 for success; 1 for a failure, a bug's traceback included; 2 for an invalid argument; 3 where no server
runs, or none that serves the model; 130 after Ctrl-C, 143 after SIGTERM.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from bundle.errors import BundleError, is_full

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

DEBUG = "BUNDLE_DEBUG"  # an environment variable, so that it works through make, too
ENDING = (signal.SIGTERM, signal.SIGHUP)


def program(doc: str | None = None, completion: bool = False) -> typer.Typer:
    """Return an application without commands.

    Args:
        completion: whether a shell can complete it, which it can only where its name is that of a program on the PATH.
    """
    return typer.Typer(
        help=doc,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def note(line: str) -> None:
    """Print a line for the person at the terminal, on standard error."""
    errors.print(line, markup=False, soft_wrap=True)


def state_columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar whose tasks have a field `state`: a few words on where they are."""
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
    )


def progress(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on standard error; by default, with `state_columns`."""
    return Progress(*(columns or state_columns()), console=errors)


@contextmanager
def opening(file: Path) -> Iterator[None]:
    """Report a file that cannot be read or written as the user's to mend.

    Raises:
        BundleError: with the file's name and the system's reason.
    """
    try:
        yield
    except OSError as exc:
        raise BundleError(f"Cannot open {exc.filename or file}: {exc.strerror or exc}.") from exc


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a program and exit with its status.

    SIGTERM and SIGHUP interrupt it as Ctrl-C does, so that whatever it started is stopped. A BundleError or an invalid
    argument is one line on standard error; with BUNDLE_DEBUG, a traceback comes before it. Every other exception is a
    bug and keeps its traceback.

    Args:
        name: the program's name in usage lines.
        arguments: by default, those of the command line.
    """
    received = interrupt_on_signals()
    logging.getLogger("ts").setLevel(logging.ERROR)  # TorchServe warns of every accelerator library that is missing
    try:
        # not `app()`: Typer would print usage errors in a box, and hide which signal interrupted the program
        status = typer.main.get_command(app).main(arguments, prog_name=name, standalone_mode=False) or 0
    except typer.TyperException as error:
        status = fail_usage(error)
    except BundleError as error:
        status = fail(str(error), error.status, error.details)
    except OSError as error:
        status = fail_system(error)
    except KeyboardInterrupt:  # between two commands' own handlers
        status = 128 + signal.SIGINT
    if received and status == 128 + signal.SIGINT:
        status = 128 + received[0]
    sys.exit(status)


def interrupt_on_signals() -> list[int]:
    """Make SIGTERM and SIGHUP interrupt this program as Ctrl-C does; return the list to which they are added."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    return received


def fail(message: str, status: int = 1, details: str = "") -> int:
    """Print an error, and the traceback that led to it where BUNDLE_DEBUG is set; return the exit status."""
    if os.environ.get(DEBUG):
        traceback.print_exc()
    if details:
        errors.print(details.strip(), style="dim", markup=False, soft_wrap=True)
    errors.print(f"error: {message}", style="bold red", markup=False, soft_wrap=True)
    return status


def fail_usage(error: typer.TyperException) -> int:
    """Print what is wrong with the command line, and where its help is."""
    message = error.format_message().replace("Value error, ", "")  # pydantic's words, inside Typer's
    status = fail(message if message.endswith(".") else f"{message}.", error.exit_code)
    if context := getattr(error, "ctx", None):
        note(f"Help: {context.command_path} --help")
    return status


def fail_system(error: OSError) -> int:
    """Report a request that failed or a disk that is full, wherever that happens; every other OSError is a bug.

    Raises:
        OSError: the bug.
    """
    if is_full(error):
        file = error.filename2 or error.filename  # the second one is a copy's target; a write names none
        place = f": {file}" if file else ""
        return fail(
            f"{error.strerror}{place}. Free some space, or set TMPDIR, RUN_DIR or TS_MODEL_STORE to a folder that has "
            "some."
        )

    import requests  # a subclass of OSError is its exceptions' base

    if isinstance(error, requests.ConnectionError):
        place = f" at {error.request.url}" if error.request else ""
        return fail(f"No server answers{place}. Check whether it runs: make status")
    if isinstance(error, requests.RequestException):
        return fail(f"The server's answer is invalid: {error}")
    raise error
