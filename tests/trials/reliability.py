"""The commands that measure reliability, and RELIABILITY.md: each run in its own section, with its machine."""

from collections.abc import Callable
from pathlib import Path

from bundle.cli import console
from loadtest.bench.results import about_this_machine

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
    return "; ".join(f"{name}: {value}" for name, value in about_this_machine().items()) + "."


def write_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Puts `text` into the document in the place of the section of this name, or at the end.

    Args:
        name: what the section's markers carry: <!-- NAME --> and <!-- end of NAME -->.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    old = document.read_text() if document.is_file() else TITLE
    section = f"{begin}\n{text.strip()}\n\n{end}"
    before, found, rest = old.partition(begin)
    if found:
        _, _, after = rest.partition(end)
        document.write_text(before + section + after)
    else:
        document.write_text(f"{old.rstrip()}\n\n{section}")
