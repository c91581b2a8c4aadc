"""Reading requests off the frontend's socket through a buffer.

TorchServe's worker takes every length and every value with a system call of its own, some twenty a request: a tenth of
the time of a worker whose model is small (BENCHMARKS.md). Upstream ended with the version that this knows, so that what
is replaced here will not change underneath.
"""

import io
import logging
import sys
from importlib.metadata import version
from socket import socket

from ts.protocol import otf_message_handler

KNOWN = "0.12.0"
BUFFER = 64 << 10  # bytes
readers: dict[socket, io.BufferedReader] = {}  # one in a worker's life


def buffer_reads() -> None:
    """From the next message on. To be called between two messages, as when the frontend waits for a model to load."""
    if version("torchserve") == KNOWN:
        otf_message_handler._retrieve_buffer = retrieve_buffer


def retrieve_buffer(connection: socket, length: int) -> bytearray:
    """The next `length` bytes. Ends the worker where the frontend has gone, as TorchServe's own does."""
    if connection not in readers:
        readers[connection] = connection.makefile("rb", buffering=BUFFER)
    data = bytearray(length)
    if length and readers[connection].readinto(data) < length:
        logging.info("Frontend disconnected.")
        sys.exit(0)
    return data
