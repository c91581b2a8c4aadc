"""Find the exception that ended a worker among the tracebacks that it logged.

TorchServe hides the cause: after a RuntimeError of a handler's `initialize` it raises "500 - Unknown exception", and
after a missing import of the handler it looks for a handler of its own, and raises that this is missing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

WORKER_STARTS = "s_name_part0="  # begins the first line of each process of a worker
WORKER_DIED = "Backend worker process died"
START = "Traceback (most recent call last):"
CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
FRAME = re.compile(r'\s+File "(.+)", line (\d+)')
UNPACKED = re.compile(r"/models/[0-9a-f]{32}/(.+)")  # where TorchServe unpacks an archive, and a file in it
HIDING = re.compile(r"RuntimeError: 50\d - |ModuleNotFoundError: No module named 'ts\.torch_handler\.")
TEMPLATE = PurePath("handlers/core")  # in every archive of the bundle: the author's own files are the others
SHOWN_LINES = 3  # of an exception's message, in a sentence


@dataclass(frozen=True)
class Trace:
    """A traceback.

    Attributes:
        lines: from "Traceback" to the end of the exception's message.
        message: the lines of the exception, with its type.
    """

    lines: list[str]
    message: list[str]

    @property
    def author(self) -> tuple[str, str] | None:
        """The last of the archive's own files that it passes through, and the line; None if it passes through none."""
        frames = [match for line in self.lines if (match := FRAME.match(line))]
        own = [(inside[1], frame[2]) for frame in frames if (inside := UNPACKED.search(frame[1]))]
        return next((each for each in reversed(own) if TEMPLATE not in PurePath(each[0]).parents), None)

    @property
    def is_archives(self) -> bool:
        return any(UNPACKED.search(line) for line in self.lines if FRAME.match(line))


def explain(said: list[str]) -> tuple[str, str]:
    """Return what ended a worker, in a line, and the traceback.

    Args:
        said: the lines that the worker printed.
    """
    said = said[max((i for i, line in enumerate(said) if line.startswith(WORKER_STARTS)), default=0) :]
    last = said[max((i for i, line in enumerate(said) if WORKER_DIED in line), default=-1) + 1 :]
    traces = list(tracebacks(said))
    if not traces or (last and START not in last):  # bundle/guard.py has refused to start it
        return (last or said)[-1], "\n".join(last or said)
    told = [trace for trace in traces if trace.is_archives] or [t for t in traces if not HIDING.match(t.message[0])]
    trace = (told or traces)[-1]
    what = " ".join(line.strip() for line in trace.message[:SHOWN_LINES])
    where = f" ({trace.author[0]}, line {trace.author[1]})" if trace.author else ""
    return what + where, "\n".join(trace.lines)


def tracebacks(said: list[str]) -> Iterator[Trace]:
    """Yield the tracebacks in the lines that a worker printed. One that ends before its exception is left out."""
    starts = [index for index, line in enumerate(said) if line == START]
    for start, end in pairwise([*starts, len(said)]):
        lines = said[start:end]
        message = next((i for i, line in enumerate(lines) if i and line.strip() and not line[0].isspace()), None)
        if message is None:
            continue
        stop = next((i for i in range(message + 1, len(lines)) if ends_message(lines[i])), len(lines))
        yield Trace(lines[:stop], lines[message:stop])


def ends_message(line: str) -> bool:
    return not line or line in CHAINED or line.startswith((WORKER_DIED, WORKER_STARTS, "Failed to load model"))
