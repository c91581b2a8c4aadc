"""The inputs of a run over many: files, folders, names on standard input, or the lines of a file."""

import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from bundle.errors import BundleError
from bundle.samples import headers

CHUNK = 2**17
STANDARD_INPUT = "-"
JSON = {"Content-Type": "application/json"}
Form = Literal["files", "jsonl", "lines"]
Identity = tuple[int, int]  # device and inode of a file


@dataclass(frozen=True)
class Input:
    """One input, which is read when it is its turn.

    Attributes:
        name: what identifies it in the output: {"file": path}, {"id": JSON value} or {"line": number from 1}.
        read: returns the body of its request; raises OSError or ValueError.
        headers: the headers of its request.
    """

    name: dict[str, object]
    read: Callable[[], bytes]
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where the inputs of a run come from.

    Args:
        places: with the form "files": files, folders, and `-` for names on standard input. With the other forms: one
            file, or `-`.
        form: "files": each file is an input. "jsonl": each line is a JSON request. "lines": each line is a text.
        output: the file that the run writes. It is not an input, even in a folder of inputs.
    """

    places: list[str]
    form: Form = "files"
    output: Path | None = None

    def inputs(self) -> Iterator[Input]:
        """Yield the inputs, in the order of the places and the lines, and by name in a folder."""
        if self.form == "files":
            output = identity(self.output)
            for name in self._names():
                yield from files(name, output)
        else:
            request = json_request if self.form == "jsonl" else text
            for number, line in lines(self.places[0]):
                yield request(number, line)

    def count(self) -> int | None:
        """Count the inputs; None if some come from standard input or a pipe, which can be read only once."""
        if STANDARD_INPUT in self.places or self.form != "files" and not Path(self.places[0]).is_file():
            return None
        return sum(1 for _ in (self.inputs() if self.form == "files" else lines(self.places[0])))

    def _names(self) -> Iterator[str]:
        for place in self.places:
            if place == STANDARD_INPUT:
                yield from (os.fsdecode(line) for _, line in lines(place))
            else:
                yield place


def identity(file: Path | None) -> Identity | None:
    """Return what distinguishes an existing file from all others, whatever its path."""
    if file is None or not file.exists():
        return None
    status = file.stat()
    return status.st_dev, status.st_ino


def files(path: str, output: Identity | None = None, named: bool = True) -> Iterator[Input]:
    """Yield a file, or the files in a folder and its subfolders, by name.

    In folders, hidden files and folders, links to folders, and what is not a regular file are left out. What cannot
    be read is an input, too, so that the output has its error.

    Args:
        output: is left out.
        named: whether a person chose this path; otherwise, it was found in a folder.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  # a str, because Path is slow for a million names
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and not named and Path(path).is_symlink():
            return
        found = sorted(os.listdir(path)) if is_folder else []  # noqa: PTH208
    except OSError as exc:
        yield Input({"file": path}, partial(fail, exc))
        return
    if is_folder:
        for name in found:
            if not name.startswith("."):
                yield from files(os.path.join(path, name), output, named=False)  # noqa: PTH118
    elif (named or stat.S_ISREG(status.st_mode)) and (status.st_dev, status.st_ino) != output:
        file = Path(path)
        yield Input({"file": path}, file.read_bytes, headers(file))


def lines(place: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the content of each line that is not blank, as soon as it can be read.

    Args:
        place: a file, or `-` for standard input.

    Raises:
        BundleError: the file cannot be opened.
    """
    number, parts = 0, list[bytes]()  # of the line that is being read: one can be longer than many chunks
    with opened(place) as stream:
        while chunk := stream.read(CHUNK):
            part, *more = chunk.split(b"\n")
            parts.append(part)
            for part in more:
                number += 1
                if (line := b"".join(parts)).strip():
                    yield number, line.removesuffix(b"\r")
                parts = [part]
    if (line := b"".join(parts)).strip():
        yield number + 1, line.removesuffix(b"\r")


def opened(place: str) -> io.FileIO:
    """Open a file, or `-` for standard input.

    It is unbuffered: so what a pipe has is read without waiting for more. And Python aborts if a thread still waits in
    its buffered standard input when the program ends.

    Raises:
        BundleError: the file cannot be opened.
    """
    if place == STANDARD_INPUT:
        return io.FileIO(0, closefd=False)
    try:
        return io.FileIO(place)
    except OSError as exc:
        raise BundleError(f"Cannot open {place}: {exc.strerror}.") from exc


def text(number: int, line: bytes) -> Input:
    """Return the input of a line of text."""
    return Input({"line": number}, lambda: line)


def json_request(number: int, line: bytes) -> Input:
    """Return the input of a line of JSON. An "id" in it becomes its name, and is not sent."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        return Input({"line": number}, partial(fail, ValueError(f"The line is not valid JSON: {exc}.")))
    if not isinstance(value, dict) or value.get("id") is None:
        return Input({"line": number}, lambda: line, JSON)
    name = {"id": value.pop("id")}
    return Input(name, lambda: json.dumps(value).encode(), JSON)


def fail(error: Exception) -> NoReturn:
    raise error
