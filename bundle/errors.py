"""The errors that a user can fix, and the exit status of each.

BundleError (1)          the command failed
├── UsageError (2)       an argument is invalid
└── NotRunning (3)       the server that the command needs is not running, or does not serve the model
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def is_full(error: BaseException) -> bool:
    """Return whether an exception tells of a full disk or the end of a quota: then no file is the cause."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT)
        or str(error.strerror).startswith("No usable temporary directory")  # tempfile has tried to write in each
    )


class BundleError(Exception):
    """A failure that the user can fix: a command prints it as one line, without a traceback.

    Args:
        message: what is wrong, and what to do.
        details: lines that show the cause, for example of a log; printed above the message.

    Attributes:
        status: the exit status of the command.
    """

    status = 1

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class UsageError(BundleError):
    """An argument is invalid, for example an unknown model or a missing file."""

    status = 2


class NotRunning(BundleError):
    """The server that the command needs is not running, or does not serve the model."""

    status = 3


@contextmanager
def blaming(blame: Callable[[Exception], BundleError]) -> Iterator[None]:
    """Turn an exception of the block, in which a user's code runs, into an error of this code; but not a full disk.

    Args:
        blame: makes the error.
    """
    try:
        yield
    except Exception as exc:
        if is_full(exc):
            raise
        raise blame(exc) from exc
