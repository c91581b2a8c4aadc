"""The page behind the proxy: what the proxy passes on to it, and its limits."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bundle.server.ports import free_ports
from tests.docker.proxy import PREDICT, Proxy, Upstream, check_error, docker, eventually, http, make_certificate

pytestmark = pytest.mark.usefixtures("fresh", "fresh_page")


@pytest.fixture(scope="module")
def page() -> Iterator[Upstream]:
    """A server in place of the page."""
    with Upstream().serving() as server:
        yield server


@pytest.fixture
def fresh_page(page: Upstream) -> None:
    page.reset()


def free_address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture(scope="module")
def settings(page: Upstream) -> dict[str, str]:
    return {"PAGE_HOST": "127.0.0.1", "PAGE_PORT": str(page.port)}


@pytest.fixture(scope="module")
def inside() -> str:
    """The address where the page asks the models, for one proxy."""
    return free_address()


@pytest.fixture(scope="module")
def paged(start, settings: dict[str, str], inside: str) -> Proxy:
    """A proxy with small limits of predictions."""
    limits = {"PROXY_RATE": "1r/m", "BURST": "1", "CONNECTIONS": "1", "MAX_BODY": "2m", "LARGE_BODIES_OF_CLIENT": "1"}
    return start(**settings, **limits, LISTEN_INSIDE=inside)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_request_is_passed_on_as_it_was_sent_with_the_address_of_the_browser(paged, page, method):
    target = "/page/gradio_api/file=/tmp/page/a%20b%2Fc.png?x=%31"
    forged = "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: elsewhere.example\r\n"
    status, _, body = paged.raw(
        f"{method} {target} HTTP/1.1\r\nHost: models.example:9000\r\n{forged}Content-Length: 1\r\n\r\na"
    )
    assert (status, body) == (200, b'{"ok": true}')
    [received] = page.received
    assert (received.method, received.path, received.body) == (method, target, b"a")
    names = ("Host", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host")
    assert [received.headers[name] for name in names] == ["models.example:9000", "127.0.0.1", "http", None]


def test_path_without_its_slash_is_redirected_on_the_port_that_the_browser_used(paged, page):
    answer = http.get(f"{paged.url}/page", allow_redirects=False, timeout=10)
    assert (answer.status_code, answer.headers["Location"]) == (301, "/page/")
    assert page.received == []


@pytest.mark.parametrize("target", ["/pages/", "/page/../models", "/page/%2e%2e/models", "/page%2f..%2fmodels"])
def test_other_path_is_rejected(paged, page, upstream, target):
    status, _, _ = paged.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status == 404
    assert page.received == upstream.received == []


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS"])
def test_other_method_is_405(paged, page, method):
    answer = http.request(method, f"{paged.url}/page/", timeout=10)
    check_error(answer, 405, "MethodNotAllowed")
    assert answer.headers["Allow"] == "GET, HEAD, POST"
    assert answer.json()["message"].endswith(": GET, HEAD, POST.")
    assert page.received == []


def test_answers_of_the_page_pass_and_its_permissions_for_other_origins_do_not(paged, page):
    page.status, page.headers = 404, {"Access-Control-Allow-Origin": "*", "Vary": "Accept-Encoding"}
    answer = http.get(f"{paged.url}/page/nothing", headers={"Origin": "https://elsewhere.example"}, timeout=10)
    assert (answer.status_code, answer.content, answer.headers["Vary"]) == (404, page.body, "Accept-Encoding")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_many_files_at_once_pass_and_take_nothing_from_predictions(start, settings):
    proxy = start(**settings, PROXY_RATE="1r/m", BURST="1", LISTEN_INSIDE=free_address())
    assert {http.get(f"{proxy.url}/page/{number}", timeout=10).status_code for number in range(200)} == {200}
    assert proxy.post().status_code == 200


def test_sizes_of_bodies_are_limited_as_for_predictions(paged, page):
    url = f"{paged.url}/page/gradio_api/upload"
    check_error(http.post(url, data=bytes(2**21 + 1), timeout=10), 413, "BodyTooLarge")
    page.release.clear()
    first = threading.Thread(target=lambda: http.post(url, data=bytes(2**20), timeout=120))
    first.start()
    eventually(lambda: page.received)
    check_error(http.post(url, data=bytes(2**20), timeout=10), 429, "TooManyRequests", "1")
    page.release.set()
    first.join()
    assert len(page.received) == 1


@contextmanager
def open_page(start, **settings: str) -> Iterator[Proxy]:
    """A proxy through which a browser has received an event, in an answer that does not end."""
    event = b"data: 1\n\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"PAGE_HOST": "127.0.0.1", "PAGE_PORT": str(server.getsockname()[1])}
        proxy = start(**address, **settings, LISTEN_INSIDE=free_address())
        with socket.create_connection(("127.0.0.1", proxy.port), 60) as browser:
            browser.sendall(b"GET /page/gradio_api/queue/data HTTP/1.1\r\nHost: x\r\n\r\n")
            server.settimeout(60)
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + event)
                received = b""
                while event not in received:
                    more = browser.recv(4096)
                    assert more, received
                    received += more
                yield proxy


def test_events_arrive_when_they_are_sent(start):
    with open_page(start):
        pass


def test_open_page_does_not_hold_up_the_end_of_the_proxy(start):
    with open_page(start, UPSTREAM_TIMEOUT="1") as proxy:
        began = time.monotonic()
        docker("kill", "--signal=QUIT", proxy.container)
        assert docker("wait", proxy.container, seconds=120).stdout.strip() == "0"
        assert 10 < time.monotonic() - began < 60  # UPSTREAM_TIMEOUT + 10 s, and the engine's own time


def test_page_that_is_down_is_503(start):
    proxy = start(PAGE_HOST="127.0.0.1", PAGE_PORT=str(free_ports(1)[0]), LISTEN_INSIDE=free_address())
    check_error(http.get(f"{proxy.url}/page/", timeout=10), 503, "ServerUnavailable", "5")


def test_page_is_served_over_tls_and_asks_the_models_without(start, settings, page, upstream, tmp_path):
    folder, inside = make_certificate(tmp_path / "tls"), free_address()
    tmp_path.chmod(0o755)
    proxy = start({folder: "/etc/bundle/tls"}, **settings, LISTEN_INSIDE=inside)
    url = f"https://localhost:{proxy.tls_port}/page/"
    assert http.get(url, verify=str(folder / "tls.crt"), timeout=10).status_code == 200
    [received] = page.received
    assert (received.headers["Host"], received.headers["X-Forwarded-Proto"]) == (url.split("/")[2], "https")
    plain = http.get(f"{proxy.url}/page/", allow_redirects=False, timeout=10)
    assert (plain.status_code, plain.headers["Location"]) == (308, url.replace("localhost", "127.0.0.1"))
    assert http.post(f"http://{inside}{PREDICT}", data=b"x", timeout=10).status_code == 200
    assert [each.path for each in upstream.received] == [PREDICT]


def test_limits_hold_for_what_the_page_asks(paged, inside, upstream):
    statuses = [http.post(f"http://{inside}{PREDICT}", data=b"x", timeout=10).status_code for _ in range(4)]
    assert statuses[-1] == 429
    assert len(upstream.received) == statuses.count(200)


@pytest.fixture(scope="module")
def behind_another(start, settings: dict[str, str]) -> Proxy:
    """A proxy that trusts the tests as a proxy in front of it."""
    return start(**settings, TRUSTED_PROXIES="127.0.0.1", LISTEN_INSIDE=free_address())


@pytest.mark.parametrize(
    ("client", "told", "scheme"),
    [("1.1.1.1", "https", "https"), ("1.1.1.1", "ftp", "http"), ("1.1.1.1", "", "http"), ("", "https", "http")],
)
def test_scheme_is_that_of_a_trusted_proxy(behind_another, page, client, told, scheme):
    headers = {"X-Forwarded-For": client or None, "X-Forwarded-Proto": told or None}  # requests sends no None
    http.get(f"{behind_another.url}/page/", headers=headers, timeout=10)
    assert page.received[0].headers["X-Forwarded-Proto"] == scheme
