"""The commands that measure reliability, and RELIABILITY.md: each run in its own section, with its machine."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from bundle import files, machine
from bundle.errors import BundleError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "RELIABILITY.md"
TITLE = "# Reliability\n\nWhat was tried, and what was seen. Each section is written by its command.\n"


def run(main: Callable, examples: str) -> None:
    """Runs a command whose options are the arguments of `main`."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: what was started is stopped
    app = typer.Typer(add_completion=False)
    app.command(epilog=f"Examples: {examples}")(main)
    try:
        app()
    except BundleError as exc:
        print(f"error: {exc}\n{exc.details}".rstrip(), file=sys.stderr)
        sys.exit(1)


def about() -> str:
    """The machine, the date and the commit of a run, in words."""
    return "; ".join(f"{name}: {value}" for name, value in machine.about().items()) + "."


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Put the text into the document in the place of the section of this name, or at the end."""
    files.write_section(document, name, text, TITLE)
