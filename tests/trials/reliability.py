"""Run the commands that measure reliability, and write their sections of RELIABILITY.md."""

from collections.abc import Callable
from pathlib import Path

from bundle import files, machine
from bundle.cli import console

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "RELIABILITY.md"
TITLE = "# Reliability\n\nResults of fault injection, fuzzing and long runs. Each section is written by its command.\n"


def run(main: Callable, module: str, *examples: str) -> None:
    """Run a command whose options are the arguments of `main`.

    Args:
        main: the command.
        module: its module, for `python -m`.
        examples: arguments for the examples in `--help`, each with a leading space.
    """
    app = console.program()
    app.command(epilog="Examples: " + " · ".join(f"`python -m {module}{example}`" for example in ("", *examples)))(main)
    console.run(app, f"python -m {module}")


def about() -> str:
    """Return the machine, the date and the commit of a run as one sentence."""
    return "; ".join(f"{name}: {value}" for name, value in machine.about().items()) + "."


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Replace the section of this name in the document, or append it."""
    files.write_section(document, name, text, TITLE)
