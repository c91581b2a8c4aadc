"""What the bundle's client makes of TorchServe's answers that cannot be had on demand."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bundle.errors import BundleError
from bundle.server.client import SCALE_TRIES, Client

STUMBLED = b'{"code": 500, "type": "ConcurrentModificationException"}'  # as it was seen under load
REFUSED = b'{"code": 400, "type": "BadRequestException", "message": "no"}'


@pytest.fixture
def answering() -> Iterator[Callable[..., tuple[Client, list[str]]]]:
    """A client of a management API that gives these answers, the last one for ever; and what it was asked."""
    servers = []

    def start(*answers: tuple[int, bytes]) -> tuple[Client, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                status, body = answers[min(len(asked), len(answers) - 1)]
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return Client("http://unused", f"http://127.0.0.1:{servers[-1].server_port}"), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_scaling_is_asked_for_again_where_torchserve_stumbles(answering):
    client, asked = answering((500, STUMBLED), (500, STUMBLED), (202, b"{}"))
    client.scale("mnist", "1.0", 2, 3)
    assert asked == ["/models/mnist/1.0?min_worker=2&max_worker=3"] * 3


def test_but_not_for_ever(answering):
    client, asked = answering((500, STUMBLED))
    with pytest.raises(BundleError, match="refused PUT /models/mnist/1.0 with 500"):
        client.scale("mnist", "1.0", 2, 3)
    assert len(asked) == SCALE_TRIES


def test_nor_where_it_refuses(answering):
    client, asked = answering((400, REFUSED))
    with pytest.raises(BundleError) as caught:
        client.scale("mnist", "1.0", 2, 3)
    assert caught.value.details == "no"
    assert len(asked) == 1
