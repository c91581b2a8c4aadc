"""The commands that measure reliability, and RELIABILITY.md: each run in its own section, with its machine."""

from collections.abc import Callable
from pathlib import Path

from bundle import files, machine
from bundle.cli import console

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "RELIABILITY.md"
TITLE = "# Reliability\n\nWhat was tried, and what was seen. Each section is written by its command.\n"


def run(main: Callable, module: str, *examples: str) -> None:
    """Run a command whose options are the arguments of `main`.

    Args:
        module: what `python -m` runs.
        examples: of its arguments.
    """
    app = console.program()
    app.command(epilog="Examples: " + " · ".join(f"`python -m {module}{example}`" for example in ("", *examples)))(main)
    console.run(app, f"python -m {module}")


def about() -> str:
    """The machine, the date and the commit of a run, in words."""
    return "; ".join(f"{name}: {value}" for name, value in machine.about().items()) + "."


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Put the text into the document in the place of the section of this name, or at the end."""
    files.write_section(document, name, text, TITLE)
