"""The proxy's gate, and its connections to the server: kept alive, moved to a new address, and drained."""

import socket
import threading
import time

import pytest
import requests

from tests.docker.proxy import PREDICT, Proxy, Upstream, check_error, docker, eventually, http, settled

pytestmark = pytest.mark.usefixtures("fresh")


# -- the gate ---------------------------------------------------------------------------------------------------------


def ping(proxy: Proxy) -> requests.Response:
    return http.get(f"{proxy.url}/ping", timeout=10)


def test_closed_gate_rejects_new_requests_and_finishes_those_in_flight(proxy, upstream, supervisor):
    closed = proxy.gate / "closed-127.0.0.1"
    upstream.release.clear()
    finished = []
    in_flight = threading.Thread(target=lambda: finished.append(proxy.post()))
    in_flight.start()
    eventually(lambda: upstream.received)
    try:
        closed.touch()
        settled(proxy, lambda: ping(proxy).status_code == 503)
        supervisor.received.clear()
        check_error(proxy.post(), 503, "ServerUnavailable", "5")
        check_error(ping(proxy), 503, "ServerUnavailable", "5")
        assert len(upstream.received) == 1
        assert supervisor.received == []
        upstream.release.set()
        in_flight.join()
        assert finished[0].status_code == 200
    finally:
        closed.unlink()
    settled(proxy, lambda: proxy.post().status_code == 200)


def test_request_whose_body_arrives_while_the_gate_is_closed_is_answered(proxy, upstream):
    """A server that drains answers what it gets, until the proxy's connections are closed."""
    closed = proxy.gate / "closed-127.0.0.1"
    try:
        with socket.create_connection(("127.0.0.1", proxy.port), 60) as slow:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
            slow.sendall(head.encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 100")  # it has passed the gate
            slow.sendall(b"a")
            closed.touch()
            settled(proxy, lambda: ping(proxy).status_code == 503)
            slow.sendall(b"b")
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        closed.unlink()
    settled(proxy, lambda: ping(proxy).status_code == 200)


# -- connections to the server ----------------------------------------------------------------------------------------


def test_connections_are_reused_and_closed_when_idle(start, upstream):
    proxy = start()
    eventually(lambda: upstream.open_connections == 0)  # those of the other proxies, too
    for _ in range(20):
        proxy.post()
    # one for each nginx worker; a pause of 2 s closes them
    assert len({received.connection for received in upstream.received}) <= 6
    eventually(lambda: upstream.open_connections == 0)


def answer_in_time(proxy: Proxy) -> bytes | None:
    try:
        return proxy.post(timeout=2).content
    except requests.Timeout:
        return None


def test_new_address_of_the_server_is_used_without_a_restart(start, upstream, tmp_path):
    hosts = tmp_path / "hosts"  # resolves names in the container
    hosts.write_text("127.0.0.1 localhost\n")
    hosts.chmod(0o644)
    proxy = start({hosts: "/etc/hosts"}, TORCHSERVE_HOST="served")
    post = proxy.post
    check_error(post(), 503, "ServerUnavailable", "5")  # the server has no address yet

    hosts.write_text("127.0.0.1 served\n")
    settled(proxy, lambda: post().status_code == 200)

    upstream.release.clear()
    finished = []
    in_flight = threading.Thread(target=lambda: finished.append(post()))
    upstream.received.clear()
    in_flight.start()
    eventually(lambda: upstream.received)
    with Upstream("127.0.0.2", upstream.port).serving() as moved:
        moved.body = b"moved"
        hosts.write_text("127.0.0.2 served\n")
        eventually(lambda: "127.0.0.2" in docker("exec", proxy.container, "cat", "/tmp/nginx/inference.servers").stdout)
        eventually(lambda: answer_in_time(proxy) == b"moved")
        upstream.release.set()
        in_flight.join()
        assert finished[0].content == b'{"ok": true}'  # the request in flight was not cut off

        hosts.write_text("127.0.0.1 localhost\n")  # without an address, the last one stays
        time.sleep(3)
        assert post().content == b"moved"


def is_refused(proxy: Proxy) -> bool:
    try:
        proxy.post(timeout=2)
    except requests.Timeout:
        pass
    except requests.ConnectionError:
        return True
    return False


def test_sigquit_finishes_requests_in_flight(start, upstream):
    proxy = start()
    upstream.release.clear()
    finished = []
    in_flight = threading.Thread(target=lambda: finished.append(proxy.post()))
    in_flight.start()
    eventually(lambda: upstream.received)
    docker("kill", "--signal=QUIT", proxy.container)
    eventually(lambda: is_refused(proxy))
    upstream.release.set()
    in_flight.join()
    assert finished[0].status_code == 200
    assert docker("wait", proxy.container).stdout.strip() == "0"
