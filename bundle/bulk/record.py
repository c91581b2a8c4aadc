"""The output of a run over many inputs: one JSON line for each, as soon as it is answered or has failed."""

import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import BundleError, UsageError
from bundle.files import replacing
from bundle.paths import relative

STANDARD_OUTPUT = 1  # its file descriptor
RETRIED = {429, 502, 503, 504}  # overload, restart, timeout: the same request may succeed later
NAMES = ("file", "id", "line")


@dataclass(frozen=True)
class Failure:
    """Why an input has no answer.

    Attributes:
        status: of HTTP; None if no server was asked, or none answered.
        message: the server's, or the reason why the input was not sent or not answered.
        type: the server's name of the error, by which programs tell errors apart; None if it has none.
    """

    status: int | None
    message: str
    type: str | None = None

    @property
    def retriable(self) -> bool:
        """Whether the same input may succeed later."""
        return self.status is None or self.status in RETRIED


class Record:
    """One JSON line for each input: its name, and its answer or its error.

    Args:
        stream: what the lines are written to, unbuffered.
        place: its name, for messages.

    Attributes:
        answered, failed: the numbers of lines of each kind, those of earlier runs included.
        earlier: the number of lines of earlier runs.
    """

    def __init__(self, stream: io.FileIO, place: str):
        self.stream, self.place = stream, place
        self.answered = self.failed = self.earlier = 0
        self._earlier: Counter[str] = Counter()

    def has(self, name: dict[str, object]) -> bool:
        """Return whether an earlier run finished this input. A name that occurs twice counts twice."""
        if not self._earlier:
            return False
        key = json.dumps(name)
        if not self._earlier[key]:
            return False
        self._earlier[key] -= 1
        return True

    def write(self, name: dict[str, object], outcome: object) -> None:
        """Write the line of an input.

        Args:
            outcome: a Failure, or its answer.

        Raises:
            BundleError: the line cannot be written.
        """
        failed = isinstance(outcome, Failure)
        result = {"error": vars(outcome)} if failed else {"answer": outcome}
        line = memoryview(encoded({**name, **result}) + b"\n")
        try:
            while line:
                line = line[self.stream.write(line) or 0 :]
        except OSError as exc:
            self.stream.close()  # no line may follow one that is not complete
            raise BundleError(f"Cannot write {self.place}: {exc.strerror or exc}.") from exc
        self.failed += failed
        self.answered += not failed

    def load(self, file: Path) -> None:
        """Take the lines of an earlier run over, without those whose inputs are to be repeated.

        These are the lines with a retriable error, and a last line that was not written to its end. The file is
        replaced as a whole.

        Raises:
            BundleError: a line is of something else; the file stays as it was.
        """
        with file.open("rb") as old, replacing(file) as partial, partial.open("wb") as new:
            for number, line in enumerate(old, 1):
                if not line.endswith(b"\n") and could_continue(line):
                    break
                name, failure = parsed(line, f"Line {number} of {relative(file)}")
                if failure and failure.retriable:
                    continue
                new.write(line)
                self._earlier[json.dumps(name)] += 1
                self.failed += failure is not None
                self.answered += failure is None
        self.earlier = self.failed + self.answered


@contextmanager
def recording(output: Path | None, resume: bool = False) -> Iterator[Record]:
    """Open the output of a run.

    Args:
        output: a file; by default, standard output.
        resume: whether to continue the file of an earlier run, if it exists.

    Raises:
        UsageError: the file has content, and is not to be continued; or it is not a regular file, and is.
        BundleError: it cannot be opened or continued, or another command writes it.
    """
    if output is None:
        yield Record(io.FileIO(STANDARD_OUTPUT, "w", closefd=False), "standard output")
        return
    file, place = output.resolve(), str(output)
    with appending(file) as stream:
        if not resume:
            if os.fstat(stream.fileno()).st_size:
                raise UsageError(f"{place} is not empty. Continue it with --resume, or name another file.")
            yield Record(stream, place)
            return
        if not file.is_file():
            raise UsageError(f"{place} is not a regular file, so that it cannot be continued.")
        record = Record(stream, place)
        record.load(file)
        # the file that `load` has put in the place of the other, which stays locked for those who have it open
        with appending(file) as record.stream:
            yield record


@contextmanager
def appending(file: Path) -> Iterator[io.FileIO]:
    """Open a file, unbuffered, to append to it, and lock it.

    Raises:
        BundleError: it cannot be opened, or another command writes it.
    """
    try:
        stream = io.FileIO(file, "a")
    except OSError as exc:
        raise BundleError(f"Cannot open {relative(file)}: {exc.strerror}.") from exc
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise BundleError(
                f"Another command writes {relative(file)}. Wait until it has ended, or name another file."
            ) from exc
        except OSError:  # a file system without locks
            pass
        yield stream


def encoded(value: object) -> bytes:
    """Return JSON in UTF-8, with escapes where UTF-8 cannot express it: a file's name may have any bytes."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def could_continue(line: bytes) -> bool:
    """Return whether a line that has no end may be the beginning of one that this module writes."""
    beginnings = [f'{{"{name}": '.encode() for name in NAMES]
    return any(line.startswith(each) or each.startswith(line) for each in beginnings)


def parsed(line: bytes, which: str) -> tuple[dict[str, object], Failure | None]:
    """Return the name of a line's input, and its failure; None if it was answered.

    Args:
        which: names the line in messages.

    Raises:
        BundleError: the line is of something else.
    """
    try:
        value = json.loads(line)
        (name, named), (kind, outcome) = value.items()
        if name not in NAMES or kind not in ("answer", "error"):
            raise ValueError(kind)
        return {name: named}, Failure(**outcome) if kind == "error" else None
    except (ValueError, TypeError, AttributeError) as exc:
        raise BundleError(f"{which} was not written by this command. Name another file, or remove the line.") from exc
