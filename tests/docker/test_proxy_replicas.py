"""The proxy in front of several servers: which of them get requests, and which requests go to another one."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.docker.proxy import Proxy, Upstream, check_error, eventually, used_servers

pytestmark = pytest.mark.usefixtures("fresh")
FIRST, SECOND = "127.0.0.1", "127.0.0.2"


@pytest.fixture(scope="module")
def second(upstream: Upstream) -> Iterator[Upstream]:
    with Upstream(SECOND, upstream.port).serving() as server:
        yield server


@pytest.fixture(scope="module")
def scaled(start, second: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    hosts: Path = tmp_path_factory.mktemp("hosts") / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{FIRST} served\n{SECOND} served\n")
    hosts.chmod(0o644)
    for folder in hosts.parents[:3]:
        folder.chmod(0o755)
    return start({hosts: "/etc/hosts"}, TORCHSERVE_HOST="served", UPSTREAM_TIMEOUT="3")


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


def test_request_that_ends_every_server_is_sent_a_bounded_number_of_times(scaled, upstream, second):
    upstream.status = second.status = None
    check_error(scaled.post(), 503, "ServerUnavailable", "5")
    assert len(upstream.received) + len(second.received) <= 3


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


def test_request_that_takes_too_long_is_not_sent_again(scaled, upstream, second):
    upstream.release.clear()
    second.release.clear()
    began = time.monotonic()
    check_error(scaled.post(), 504, "UpstreamTimeout")
    assert 2.9 < time.monotonic() - began < 5
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
    eventually(lambda: used_servers(scaled.container) == {FIRST})
    alive[1].touch()
    eventually(lambda: used_servers(scaled.container) == {FIRST, SECOND})

    for file in alive:
        long_ago(file)
    time.sleep(2.5)
    assert used_servers(scaled.container) == {FIRST, SECOND}
