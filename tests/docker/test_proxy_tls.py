"""TLS at the proxy."""

import json
import socket
import ssl
import time
from pathlib import Path

import pytest

from tests.docker.proxy import PREDICT, Proxy, check_error, eventually, http, make_certificate

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls(start, certificate) -> Proxy:
    return start({certificate: "/etc/bundle/tls"})


def test_request_over_tls_is_passed_on(tls, certificate, upstream):
    answer = http.post(
        f"https://localhost:{tls.tls_port}{PREDICT}", data=b"x", verify=str(certificate / "tls.crt"), timeout=10
    )
    assert (answer.status_code, answer.content) == (200, b'{"ok": true}')
    assert upstream.received[0].headers["X-Forwarded-Proto"] == "https"
    unknown = http.get(f"https://localhost:{tls.tls_port}/models", verify=str(certificate / "tls.crt"), timeout=10)
    check_error(unknown, 404, "NotFound")


def test_plain_http_is_redirected_to_tls(tls, upstream):
    answer = http.post(f"{tls.url}{PREDICT}?a=b", data=b"x", allow_redirects=False, timeout=10)
    assert (answer.status_code, answer.headers["Location"]) == (308, f"https://127.0.0.1:{tls.tls_port}{PREDICT}?a=b")
    status, _, body = tls.raw("nonsense\r\n\r\n")
    assert (status, json.loads(body)["type"]) == (400, "BadRequest")
    assert upstream.received == []


def test_plain_http_on_the_tls_port_is_400(tls):
    check_error(http.get(f"http://127.0.0.1:{tls.tls_port}/ping", timeout=10), 400, "BadRequest")


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
        (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_1, None),
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_only_tls_1_2_and_1_3_are_accepted(tls, version, spoken):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that the server refuses TLS 1.1, not this client
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", tls.tls_port), 10) as connection:
        if spoken is None:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection)
        else:
            with context.wrap_socket(connection) as secured:
                assert secured.version() == spoken
                assert "GCM" in secured.cipher()[0] or "CHACHA20" in secured.cipher()[0]


def test_plain_http_beside_tls_is_served_if_it_is_allowed(start, certificate):
    proxy = start({certificate: "/etc/bundle/tls"}, ALLOW_PLAIN="true")
    assert proxy.post().status_code == 200
    secured = http.post(
        f"https://localhost:{proxy.tls_port}{PREDICT}", data=b"x", verify=str(certificate / "tls.crt"), timeout=10
    )
    assert secured.status_code == 200


def test_renewed_certificate_is_used_without_a_restart(start, tmp_path):
    tmp_path.chmod(0o755)
    folder = make_certificate(tmp_path / "tls")
    proxy = start({folder: "/etc/bundle/tls"})
    address = ("127.0.0.1", proxy.tls_port)
    first = ssl.get_server_certificate(address)
    time.sleep(1.1)  # a new file must differ in its second of modification
    make_certificate(folder)
    eventually(lambda: ssl.get_server_certificate(address) != first)
