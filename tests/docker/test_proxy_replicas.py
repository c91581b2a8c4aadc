"""The proxy in front of several servers: which of them get requests, and which requests go to another one."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.docker.proxy import Proxy, Upstream, check_error, docker, eventually, used_servers

pytestmark = pytest.mark.usefixtures("fresh")
FIRST, SECOND = "127.0.0.1", "127.0.0.2"
OTHERS = ("127.0.0.3", "127.0.0.4", "127.0.0.5")
# `getent` of Alpine's images (musl) shows one address of a host, unless it is asked for all
GETENT = """#!/bin/sh
if [ "$1" = hosts ]; then /usr/bin/getent "$@" | head -n 1; else exec /usr/bin/getent "$@"; fi
"""
KEPT = {"Connection": "keep-alive"}  # all requests go to one of the two processes of nginx


@pytest.fixture(scope="module")
def second(upstream: Upstream) -> Iterator[Upstream]:
    with Upstream(SECOND, upstream.port).serving() as server:
        yield server


@pytest.fixture(scope="module")
def others(upstream: Upstream) -> Iterator[list[Upstream]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Upstream(address, upstream.port).serving()) for address in OTHERS]


def readable(folder: Path, name: str, text: str) -> Path:
    """Write a file that the user in the container may read and execute."""
    file = folder / name
    file.write_text(text)
    for path in (file, *file.parents[:3]):
        path.chmod(0o755)
    return file


def hosts(folder: Path, *addresses: str) -> dict[Path, str]:
    """Return the mount of a file in which the host `served` has these addresses."""
    lines = ["127.0.0.1 localhost", *(f"{address} served" for address in addresses), ""]
    return {readable(folder, "hosts", "\n".join(lines)): "/etc/hosts"}


@pytest.fixture(scope="module")
def scaled(start, second: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    mounts = hosts(tmp_path_factory.mktemp("hosts"), FIRST, SECOND)
    return start(mounts, TORCHSERVE_HOST="served")


@pytest.fixture(scope="module")
def five(start, second: Upstream, others: list[Upstream], tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    """A proxy in front of five servers, with a `getent` as Alpine's."""
    folder = tmp_path_factory.mktemp("hosts")
    mounts = hosts(folder, FIRST, SECOND, *OTHERS) | {readable(folder, "getent", GETENT): "/bundle-test/getent"}
    path = "/bundle-test:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return start(mounts, TORCHSERVE_HOST="served", PATH=path)


@pytest.fixture(autouse=True)
def reset(second: Upstream, scaled: Proxy) -> None:
    """The second server answers, and both get requests."""
    second.reset()
    for file in scaled.gate.iterdir():
        file.unlink()
    eventually(lambda: used_servers(scaled.container) == {FIRST, SECOND})


def shares(proxy: Proxy, first: Upstream, second: Upstream, requests: int = 40) -> tuple[int, int]:
    """Send requests that must be answered 200, and return how many each server got."""
    before = len(first.received), len(second.received)
    assert Counter(proxy.post().status_code for _ in range(requests)) == {200: requests}
    return len(first.received) - before[0], len(second.received) - before[1]


def test_servers_share_the_requests(scaled, upstream, second):
    assert min(shares(scaled, upstream, second)) >= 10


def test_request_whose_server_ends_without_an_answer_goes_to_the_other_one(scaled, upstream, second):
    second.status = None
    first_got, second_got = shares(scaled, upstream, second)
    assert first_got == 40
    assert second_got > 0


def test_all_servers_are_found_where_getent_shows_one_address_of_a_host(five):
    assert docker("exec", five.container, "getent", "hosts", "served").stdout.count("\n") == 1
    assert used_servers(five.container) == {FIRST, SECOND, *OTHERS}


def test_request_that_ends_every_server_is_sent_to_each_once(five, upstream, second, others):
    """nginx does not count what fails on a kept connection as one of three tries."""
    servers = [upstream, second, *others]
    seen = []
    for _ in range(5):
        for server in servers:
            server.reset()
        for _ in range(20):  # a connection to each is kept, by the process of nginx that has the client's connection
            assert five.post(headers=KEPT).status_code == 200
        assert all(server.received for server in servers)
        for server in servers:
            server.received.clear()
            server.status = None
        check_error(five.post(headers=KEPT), 503, "ServerUnavailable", "5")
        seen.append([len(server.received) for server in servers])
        if seen[-1] == [1] * 5:
            break  # otherwise, a pause of 2 s has closed the connections
    assert seen[-1] == [1] * 5, seen
    assert max(map(max, seen)) == 1, seen


def test_503_of_one_server_is_answered_by_the_other_one(scaled, upstream, second):
    second.status = 503
    first_got, second_got = shares(scaled, upstream, second)
    assert (first_got, second_got > 0) == (40, True)
    upstream.status = 503
    assert scaled.post().status_code == 503


def test_429_and_500_pass(scaled, upstream, second):
    for status in (429, 500):
        upstream.status = second.status = status
        assert scaled.post().status_code == status
    assert len(upstream.received) + len(second.received) == 2


def test_request_that_takes_too_long_is_not_sent_again(start, upstream, second, tmp_path):
    proxy = start(hosts(tmp_path, FIRST, SECOND), TORCHSERVE_HOST="served", UPSTREAM_TIMEOUT="3")
    upstream.release.clear()
    second.release.clear()
    began = time.monotonic()
    check_error(proxy.post(), 504, "UpstreamTimeout")
    assert 2.9 < time.monotonic() - began < 20
    assert len(upstream.received) + len(second.received) == 1


def test_server_whose_gate_is_closed_is_left_out_until_it_opens(scaled, upstream, second):
    closed = scaled.gate / f"closed-{SECOND}"
    closed.touch()
    eventually(lambda: used_servers(scaled.container) == {FIRST})
    eventually(lambda: shares(scaled, upstream, second, 5) == (5, 0))
    closed.unlink()
    eventually(lambda: used_servers(scaled.container) == {FIRST, SECOND})


def test_server_without_a_beat_is_left_out_if_another_one_has_them(scaled):
    alive = [scaled.gate / f"alive-{address}" for address in (FIRST, SECOND)]
    for file in alive:
        file.touch()
    time.sleep(1.5)
    assert used_servers(scaled.container) == {FIRST, SECOND}

    long_ago = partial(os.utime, times=(time.time() - 60,) * 2)
    long_ago(alive[1])
    eventually(lambda: alive[0].touch() or used_servers(scaled.container) == {FIRST})
    alive[1].touch()
    eventually(lambda: used_servers(scaled.container) == {FIRST, SECOND})

    for file in alive:
        long_ago(file)
    time.sleep(2.5)
    assert used_servers(scaled.container) == {FIRST, SECOND}
