"""How a worker reads requests from the frontend's socket, compared with TorchServe's own reader."""

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ts import service
from ts.async_service import AsyncService
from ts.protocol import otf_message_handler

from handlers.core import wire
from handlers.core.request import Repeated, UnparsedJSON

TORCHSERVES = {
    module: {name: vars(module)[name] for name in names}
    for module, names in (
        (otf_message_handler, ("_retrieve_buffer", "_retrieve_inference_msg")),
        (service.Service, ("retrieve_data_for_inference",)),
    )
}

Headers = list[tuple[bytes, bytes]]
Parameters = list[tuple[bytes, bytes, bytes]]  # name, content type, value
Request = tuple[bytes, Headers, Parameters]

TYPES = [b"", b"application/json", b"text/plain", b"text/csv; charset=utf-8", b"image/png", b"Application/JSON"]
names = st.text(max_size=12).map(str.encode)
values = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b'{"a": [1, null]}', b"[" * 2000, b"null", b"\xff", "größe".encode()]),
    st.integers(1, 3).map(lambda times: b"\x00\x7f\xff" * (wire.BUFFER // 2) * times),
)
requests = st.tuples(
    st.uuids().map(lambda each: str(each).encode()),
    st.lists(st.tuples(names, names), max_size=4),
    st.lists(
        st.tuples(st.one_of(names, st.just(b"body")), st.sampled_from(TYPES), values),
        max_size=3,
        unique_by=lambda parameter: parameter[0],
    ),
)


@pytest.fixture(autouse=True)
def torchserves_reader() -> Iterator[None]:
    """Restore TorchServe's functions after each test, as another module of the suite may have replaced them."""
    with torchserve_as_it_is():
        yield


@contextmanager
def torchserve_as_it_is() -> Iterator[None]:
    before = {module: {name: vars(module)[name] for name in found} for module, found in TORCHSERVES.items()}
    install(TORCHSERVES)
    try:
        yield
    finally:
        install(before)
        for stream in wire.streams.values():
            stream.connection.close()
        wire.streams.clear()


def install(functions: dict) -> None:
    for module, found in functions.items():
        for name, function in found.items():
            setattr(module, name, function)


def field(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


END = struct.pack("!i", -1)


def message(batch: list[Request]) -> bytes:
    """Return a prediction as the frontend writes it."""
    content = b"I"
    for request_id, headers, parameters in batch:
        content += field(request_id)
        content += b"".join(field(name) + field(value) for name, value in headers) + END
        content += b"".join(b"".join(map(field, parameter)) for parameter in parameters) + END
    return content + END


def read(content: bytes, piece: int, count: int = 1) -> list[tuple]:
    """Send the content in pieces, and read messages from it; return headers, rows and ids of each."""
    sender, receiver = socket.socketpair()

    def send() -> None:
        for start in range(0, len(content), piece):
            sender.sendall(content[start : start + piece])
        sender.close()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        found = []
        for _ in range(count):
            command, batch = otf_message_handler.retrieve_msg(receiver)
            assert command == b"I"
            headers, rows, ids = service.Service.retrieve_data_for_inference(batch)
            assert type(rows) is list
            found.append(([each.get_request_properties() for each in headers], rows, ids))
        return found
    finally:
        thread.join()
        wire.streams.pop(receiver, None)
        receiver.close()


def kinds(rows: list[dict]) -> list[dict]:
    """Return the types of the values; what is called JSON, and is not, is a bytearray for TorchServe."""
    return [{name: bytearray if type(v) is UnparsedJSON else type(v) for name, v in row.items()} for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=5), st.sampled_from([7, 1000, 60_000, 1 << 22]), st.sampled_from([None, "false"]))
def test_batch_is_what_torchserves_reader_makes_of_it(batch: list[Request], piece: int, decode: str | None):
    content = message(batch) * 2
    piece = max(piece, len(content) // 200)  # long values in few pieces
    with torchserve_as_it_is(), pytest.MonkeyPatch.context() as patch:
        if decode:
            patch.setenv("TS_DECODE_INPUT_REQUEST", decode)
        expected = read(content, piece, count=2)
        wire.read_in_one_pass()
        actual = read(content, piece, count=2)
    assert actual == expected
    for (_, rows, _), (_, other, _) in zip(actual, expected, strict=True):
        assert kinds(rows) == kinds(other)


@pytest.mark.parametrize("lost", [1, 4, 5, 30, 200_000])
@pytest.mark.parametrize("install_reader", [lambda: None, wire.read_in_one_pass])
def test_frontend_that_disconnects_within_a_message_ends_the_worker(lost: int, install_reader: Callable[[], None]):
    install_reader()
    content = message([(b"1", [(b"a", b"b")], [(b"body", b"image/png", b"x" * 300_000)])])
    with pytest.raises(SystemExit) as ended:
        read(content[:-lost], 50_000)
    assert ended.value.code == 0


def test_load_message_is_read_by_torchserve_through_the_same_stream():
    wire.read_in_one_pass()
    load = b"L" + field(b"text") + field(b"/models/text") + struct.pack("!i", 32) + field(b"text.py")
    load += struct.pack("!i", -1) + field(b"") + b"\x01"
    sender, receiver = socket.socketpair()
    with sender, receiver:
        sender.sendall(load + message([(b"1", [], [])]))
        command, loaded = otf_message_handler.retrieve_msg(receiver)
        assert (command, loaded["modelName"], loaded["batchSize"]) == (b"L", b"text", 32)
        command, batch = otf_message_handler.retrieve_msg(receiver)
        assert (command, batch.ids) == (b"I", {0: "1"})


def test_invalid_json_is_logged_and_passed_on_as_bytes(caplog: pytest.LogCaptureFixture):
    wire.read_in_one_pass()
    with caplog.at_level(logging.WARNING):
        [(_, rows, _)] = read(message([(b"1", [], [(b"body", b"application/json", b"{")])]), 100)
    assert rows == [{"body": bytearray(b"{")}]
    [line] = caplog.text.splitlines()  # no traceback, so that invalid bodies do not fill the logs
    assert "application/json cannot be decoded, and is passed on as bytes: Expecting property name" in line


def test_field_that_is_sent_several_times_has_all_of_its_values():
    parameters = [(b"data", b"text/plain", b"a"), (b"top_k", b"", b"1"), (b"data", b"", b"b"), (b"data", b"", b"")]
    content = message([(b"1", [], parameters)])
    assert read(content, 100)[0][1] == [{"data": bytearray(), "top_k": bytearray(b"1")}]  # TorchServe's: the last one
    wire.read_in_one_pass()
    [(_, [row], _)] = read(content, 100)
    assert row == {"data": ["a", bytearray(b"b"), bytearray()], "top_k": bytearray(b"1")}
    assert isinstance(row["data"], Repeated)


def test_field_that_is_sent_very_often_is_read_in_time():
    """A small compressed form can have millions of fields."""
    start = time.process_time()
    values: object = b""
    for _ in range(100_000):
        values = Repeated.added(values, b"")
    assert (len(values), time.process_time() - start < 5) == (100_001, True)


@pytest.mark.parametrize("text", [b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}'])
def test_json_beyond_the_standard_is_passed_on_as_bytes(text: bytes):
    wire.read_in_one_pass()
    [(_, rows, _)] = read(message([(b"1", [], [(b"body", b"application/json", text)])]), 100)
    assert rows == [{"body": bytearray(text)}]


@pytest.mark.parametrize(
    ("content_type", "text", "kind"),
    [(b"application/json", b'{"a": 1, "a": 2}', UnparsedJSON), (b"text/plain", b"\xff", bytearray)],
)
def test_part_that_is_called_json_and_is_not_says_so_to_the_handler(content_type: bytes, text: bytes, kind: type):
    wire.read_in_one_pass()
    [(_, [row], _)] = read(message([(b"1", [], [(b"data", content_type, text)])]), 100)
    assert (row, type(row["data"])) == ({"data": bytearray(text)}, kind)


def test_negative_length_of_a_value_is_an_empty_value():
    nothing = struct.pack("!i", -2)
    content = b"I" + field(b"1") + field(b"name") + nothing + END + field(b"body") + nothing + nothing + END + END
    expected = read(content, 100)
    wire.read_in_one_pass()
    assert read(content, 100) == expected


@pytest.mark.parametrize("install_reader", [lambda: None, wire.read_in_one_pass])
def test_negative_length_of_a_buffer_is_empty_and_reads_nothing(install_reader: Callable[[], None]):
    install_reader()
    sender, receiver = socket.socketpair()
    with sender, receiver:
        sender.sendall(b"abcd")
        read = [otf_message_handler._retrieve_buffer(receiver, length) for length in (2, -1, 2)]
    assert read == [b"ab", b"", b"cd"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_message_is_one_that_torchserves_async_service_reads_if_the_model_asks_for_it(asynchronous: bool):
    wire.read_in_one_pass({"asyncCommunication": asynchronous})
    sender, receiver = socket.socketpair()
    with sender, receiver:
        service_of_model = SimpleNamespace(cl_socket=receiver, predict=None)
        receives = AsyncService(service_of_model)
        sender.sendall(message([(b"1", [], [(b"body", b"image/png", b"x")])]))
        sender.shutdown(socket.SHUT_WR)
        with pytest.raises(SystemExit):
            receives.receive_requests()
        batch: list = []
        batch += receives.in_queue.get_nowait()  # as in AsyncService.fetch_batches
    assert isinstance(batch[0], dict) is asynchronous


def test_other_torchserve_keeps_its_own_reader(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setitem(wire.KNOWN_SOURCES, service, "0" * 64)
    with caplog.at_level(logging.WARNING):
        wire.read_in_one_pass()
    assert "ts.service is not that of TorchServe 0.12.0" in caplog.text
    for module, functions in TORCHSERVES.items():
        assert {name: vars(module)[name] for name in functions} == functions
