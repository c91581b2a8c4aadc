"""Runs a program's application in this process, as `bundle.cli.console.run` does it."""

import io
import logging
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest
import typer

from bundle.cli import console


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    status: int
    stdout: str
    stderr: str


def run(app: typer.Typer, *arguments: str) -> Ended:
    """Run the application to its end.

    Raises:
        Exception: what it does not handle, which is a bug.
    """
    out, err = io.StringIO(), io.StringIO()
    torchserves = logging.getLogger("ts")
    level = torchserves.level
    handlers = {number: signal.getsignal(number) for number in console.ENDING}
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            console.run(app, "program", arguments)
    finally:
        torchserves.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())
