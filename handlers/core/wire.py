"""Read the requests from the frontend's socket through a buffer.

TorchServe's worker makes a system call for every length and every value, about twenty per request: a tenth of the time
of a worker with a small model (BENCHMARKS.md). 0.12.0 is the last version of TorchServe, so the function that is
replaced here will not change.
"""

import io
import logging
import sys
from importlib.metadata import version
from socket import socket

from ts.protocol import otf_message_handler

SUPPORTED_VERSION = "0.12.0"
BUFFER = 64 << 10  # bytes
readers: dict[socket, io.BufferedReader] = {}  # a worker has one connection


def buffer_reads() -> None:
    """Read through a buffer, starting with the next message.

    Call this between two messages, such as while the frontend waits for the model to load.
    """
    if version("torchserve") == SUPPORTED_VERSION:
        otf_message_handler._retrieve_buffer = retrieve_buffer


def retrieve_buffer(connection: socket, length: int) -> bytearray:
    """Return the next `length` bytes. Exit if the frontend has closed the connection, as TorchServe's function does."""
    if connection not in readers:
        readers[connection] = io.BufferedReader(connection.makefile("rb", buffering=0), BUFFER)
    data = bytearray(length)
    if length and readers[connection].readinto(data) < length:
        logging.info("Frontend disconnected.")
        sys.exit(0)
    return data
