"""Read the requests from the frontend's socket: a batch in one pass over what one system call received.

TorchServe's worker makes a system call for every length and every value, and builds the batch from many small objects.
With a small model, reading takes a fifth of a worker's time (BENCHMARKS.md). TorchServe also keeps only the last value
of a form field that is sent several times; here, the row has all of them. This module replaces functions only if
TorchServe's source files are the expected ones.
"""

import hashlib
import logging
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from socket import socket
from typing import NamedTuple, NoReturn

from ts import service
from ts.context import RequestProcessor
from ts.protocol import otf_message_handler

from handlers.core.request import Repeated, UnparsedJSON
from handlers.core.strict_json import parse_json

logger = logging.getLogger(__name__)

KNOWN_SOURCES = {  # SHA-256 of the files in TorchServe 0.12.0
    otf_message_handler: "83e82dc62b4a95a362efe4518786c6b389b895b85acaf37721aaff042ec9989a",
    service: "f18259269551299d25f4e9d2bdc916c8308c10233501df08196cc7cfa2d0d291",
}
BUFFER = 128 << 10  # bytes that are received at once; a longer value is received into its own memory
END = -1  # in place of a length: the end of a list
read_length = struct.Struct("!i").unpack_from


class Batch(NamedTuple):
    """The requests of a batch, as `Service.retrieve_data_for_inference` returns them."""

    headers: list[RequestProcessor]
    rows: list[dict[str, object]]
    ids: dict[int, str]


class Stream:
    """The bytes that the frontend sends.

    Attributes:
        data: what was received last.
        at: how much of it was read.
    """

    def __init__(self, connection: socket):
        self.connection, self.data, self.at = connection, b"", 0

    def fill(self, length: int) -> None:
        """Receive until `length` unread bytes are there. Exit if the frontend has closed the connection."""
        parts = [self.data[self.at :]]
        missing = length - len(parts[0])
        while missing > 0:
            parts.append(self.connection.recv(BUFFER))
            missing -= len(parts[-1])
            if not parts[-1]:
                disconnected()
        self.data, self.at = b"".join(parts), 0

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        if self.at + length > len(self.data):
            self.fill(length)
        self.at += length
        return self.data[self.at - length : self.at]

    def take_long(self, length: int) -> bytearray:
        """Return the next `length` bytes, and receive those that are missing into place."""
        value = bytearray(length)
        known = self.data[self.at : self.at + length]
        value[: len(known)] = known
        self.at += len(known)
        rest = memoryview(value)[len(known) :]
        while rest:
            received = self.connection.recv_into(rest)
            if not received:
                disconnected()
            rest = rest[received:]
        return value

    def field(self) -> bytes | None:
        """Return the next value, or None at the end of a list."""
        data, start = self.data, self.at + 4
        if start > len(data):
            self.fill(4)
            data, start = self.data, 4
        (length,) = read_length(data, start - 4)
        self.at = end = start + length
        if length < 0:
            self.at = start
            return None if length == END else b""
        if end > len(data):
            self.at = start
            return self.take(length)
        return data[start:end]

    def value(self) -> bytearray:
        """Return the next value, which may be long."""
        (length,) = read_length(self.take(4))
        return self.take_long(length) if length > BUFFER else bytearray(self.take(max(0, length)))

    def batch(self) -> Batch:
        """Read the requests of a prediction, up to the end of their list."""
        headers: list[RequestProcessor] = []
        rows: list[dict[str, object]] = []
        ids: dict[int, str] = {}
        decodes = os.environ.get("TS_DECODE_INPUT_REQUEST", "true") == "true"
        field = self.field
        while (request_id := field()) is not None:
            own: dict[str, str] = {}
            while (name := field()) is not None:
                own[name.decode()] = (field() or b"").decode()
            row: dict[str, object] = {}
            types: dict[str, dict[str, str]] = {}
            while (name := field()) is not None:
                key, content_type = name.decode(), (field() or b"").decode()
                value = parsed(self.value(), content_type) if decodes else self.value()
                row[key] = Repeated.added(row[key], value) if key in row else value
                types[key] = {"content-type": content_type}
            ids[len(rows)] = request_id.decode()
            rows.append(row)
            headers.append(RequestProcessor({**types, **own}))
        return Batch(headers, rows, ids)


streams: dict[socket, Stream] = {}  # a worker has one connection


def read_in_one_pass(config: Mapping[str, object] | None = None) -> None:
    """Replace TorchServe's reader, starting with the next message.

    Call this between two messages, such as while the frontend waits for the model to load.

    Args:
        config: the model's model-config.yaml. With `asyncCommunication`, TorchServe's own functions stay, because its
            AsyncService appends messages to a list.
    """
    if config and config.get("asyncCommunication"):
        return
    for module, expected in KNOWN_SOURCES.items():
        if hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() != expected:
            logger.warning("%s is not that of TorchServe 0.12.0: it reads requests itself, slowly", module.__name__)
            return
    otf_message_handler._retrieve_buffer = read_bytes
    otf_message_handler._retrieve_inference_msg = lambda connection: stream_of(connection).batch()
    service.Service.retrieve_data_for_inference = staticmethod(unpacked)


def stream_of(connection: socket) -> Stream:
    if connection not in streams:
        streams[connection] = Stream(connection)
    return streams[connection]


def read_bytes(connection: socket, length: int) -> bytearray:
    """Return the next bytes; none for a negative length, as in TorchServe."""
    return bytearray(stream_of(connection).take(max(0, length)))


def unpacked(batch: object, torchserves=service.Service.retrieve_data_for_inference) -> Batch:
    """Return headers, rows and ids of a batch; also of one that TorchServe's reader read."""
    return batch if isinstance(batch, Batch) else torchserves(batch)


def parsed(value: bytearray, content_type: str) -> object:
    """Parse JSON, and decode text. A value that is invalid stays as it is: the handler rejects it."""
    try:
        if content_type == "application/json":
            return parse_json(value.decode())
        if content_type.startswith("text"):
            return value.decode()
    except Exception as exc:  # as in TorchServe; JSON that is nested too deeply raises RecursionError
        # without a traceback, so that a client with invalid bodies does not fill the logs
        logger.warning("An input of type %s cannot be decoded, and is passed on as bytes: %s", content_type, exc)
        if content_type == "application/json":
            return UnparsedJSON(value)
    return value


def disconnected() -> NoReturn:
    logger.info("Frontend disconnected.")
    sys.exit(0)
