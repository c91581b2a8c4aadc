"""Arguments and options that several commands have, and the kinds of value that Typer does not know."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bundle import durations


def duration(text: str) -> float:
    """Parse `100ms` or `1h30m`, in seconds."""
    try:
        return durations.seconds(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def rate(text: str) -> float:
    """Parse a number of requests a second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is not a number of requests a second, such as 5000.")
    return value


def replicas(text: str) -> int:
    """Parse a number of replicas, which may be 0."""
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is not a number of replicas, such as 0 or 2.")
    return int(text)


def comma_list(parse: Callable[[str], Any], what: str) -> Callable[[str], tuple]:
    """Return a parser of values with commas or spaces between them.

    Args:
        parse: one value; raises ValueError.
        what: the values, for the message: "numbers".
    """

    def parse_list(text: str) -> tuple:
        words = [word for word in re.split(r"[,\s]+", text) if word]
        try:
            values = [parse(word) for word in words]
        except ValueError as exc:
            raise typer.BadParameter(f"{text!r} is not a list of {what} with commas between them.") from exc
        if not values:
            raise typer.BadParameter(f"the list of {what} is empty.")
        return tuple(values)

    return parse_list


def choice(*names: str) -> Callable[[str], str]:
    """Return a parser that accepts these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is not one of: {', '.join(names)}.")
        return text

    return parse


def address(text: str) -> tuple[str, int]:
    """Parse `127.0.0.1:8083`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise typer.BadParameter(f"{text!r} is not an address like 127.0.0.1:8083.")
    return host, int(port)


def worker_count(text: str) -> tuple[str, int]:
    """Parse `mnist=2`."""
    model, _, count = text.partition("=")
    if not model or not count.isdecimal() or int(count) == 0:
        raise typer.BadParameter(f"{text!r} is not a model and its number of workers, such as mnist=2.")
    return model, int(count)


def file_or_dash(text: str) -> Path:
    """Parse the path of an existing file, or `-` for standard input.

    Typer's own check does not know `-` for parameters of the type Path, although it has `allow_dash` (0.29.2).
    """
    file = Path(text)
    if text != "-" and not file.is_file():
        raise typer.BadParameter(f"file {text!r} does not exist.")
    return file


def model_names(incomplete: str) -> Iterator[str]:
    """Complete the name of a model folder, in a shell."""
    from bundle.catalog import folders

    yield from (folder.name for folder in folders() if folder.name.startswith(incomplete))


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=model_names,
        help="Folders in models/, or `all`. By default, all but those served on request.",
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names, help="A model that is served.")]
Folder = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names, help="A folder in models/.")]
Target = Annotated[
    float, typer.Option(parser=duration, metavar="DURATION", help="Latency that 99 % of the answers must keep.")
]
Inputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        "-i",
        exists=True,
        dir_okay=False,
        help="An input to send; several take turns. By default, the model's sample.",
    ),
]
Patience = typer.Option(
    parser=duration,
    metavar="DURATION",
    help="How long to repeat a request while the server is overloaded or does not answer.",
)
Timeout = typer.Option("--timeout", "-t", min=0, help="Seconds to wait until every worker is READY.")
