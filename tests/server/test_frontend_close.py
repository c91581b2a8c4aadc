"""The frontend's patch `close`: a connection ends after the answer if the client asks for it."""

import socket
from urllib.parse import urlsplit

import pytest

from tests.server.bare import Bare

BODY = b"Content-Length: 1\r\n\r\nx"


def answered(url: str, request: bytes, seconds: float = 60) -> tuple[bytes, bool]:
    """Send a request on a connection of its own.

    Args:
        seconds: how long to wait for more, after the first part of the answer.

    Returns:
        what came, and whether the server closed the connection.
    """
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(request)
        came = connection.recv(65536)
        connection.settimeout(seconds)
        try:
            while part := connection.recv(65536):
                came += part
        except TimeoutError:
            return came, False
    return came, True


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /predictions/one HTTP/1.0\r\n" + BODY,
        b"POST /predictions/one HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + BODY,
        b"POST /predictions/one HTTP/1.1\r\nHost: x\r\nconnection: Close\r\n" + BODY,
        b"GET /ping HTTP/1.0\r\n\r\n",
        b"POST /predictions/unknown HTTP/1.0\r\n" + BODY,
    ],
)
def test_connection_that_the_client_wants_to_end_is_closed_after_the_whole_answer(patched: Bare, request_: bytes):
    came, closed = answered(patched.inference, request_)
    head, _, body = came.partition(b"\r\n\r\n")
    assert closed
    assert b"connection: close" in head.lower()
    assert f"content-length: {len(body)}".encode() in head.lower()
    assert body.rstrip().endswith(b"}")


def test_long_answer_is_whole_at_the_end_of_its_connection(patched: Bare):
    """With TorchServe's own option of the socket, the end would discard what is not sent yet."""
    length = 2_000_000
    request = b"POST /predictions/one HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % length + length * b"x"
    came, closed = answered(patched.inference, request)
    assert closed
    assert len(came.partition(b"\r\n\r\n")[2]) > length


@pytest.mark.parametrize("port", ["inference", "management"])
def test_answers_to_requests_of_one_connection_are_all_sent_before_its_end(patched: Bare, port: str):
    path = b"/predictions/one" if port == "inference" else b"/models"
    method = b"POST" if port == "inference" else b"GET"
    first = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + (BODY if port == "inference" else b"\r\n")
    last = first.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    came, closed = answered(getattr(patched, port), first + last)
    assert came.count(b"HTTP/1.1 200") == 2
    assert closed


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /predictions/one HTTP/1.1\r\nHost: x\r\n" + BODY,
        b"POST /predictions/one HTTP/1.0\r\nConnection: keep-alive\r\n" + BODY,
    ],
)
def test_other_connection_stays_open(patched: Bare, request_: bytes):
    came, closed = answered(patched.inference, request_, 1)
    assert b"200" in came.partition(b"\r\n")[0]
    assert not closed


def test_connection_without_the_patch_stays_open(unpatched: Bare):
    assert not answered(unpatched.inference, b"GET /ping HTTP/1.0\r\n\r\n", 1)[1]
