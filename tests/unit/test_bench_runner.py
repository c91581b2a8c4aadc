"""The benchmark's runner with the real wrk, and small HTTP servers in place of the systems."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import requests

from bundle.errors import BundleError
from bundle.load.generator import LoadResult
from bundle.server.ports import free_ports
from loadtest.bench import runner as bench
from loadtest.bench import usage
from loadtest.bench.cases import CASES
from loadtest.bench.results import Failure, Measurement, Results, WarmUp
from loadtest.bench.runner import Plan, Runner
from loadtest.bench.systems.base import Endpoint
from tests.support import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk"),
]

CASE = CASES["text"]
ANSWER = {"top_k": [{"label": "transfer", "class": 130, "probability": 0.99}]}
SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = sys.argv[2].encode()
        self.connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(answer), answer))
    def log_message(self, *_):
        pass

ThreadingHTTPServer.request_queue_size = 128  # an open loop connects 64 clients at once; the default is 5
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass
class Small:
    """A system that gives the same answer to every request.

    Attributes:
        started: the PIDs of its servers.
    """

    name: str
    answer: dict = field(default_factory=lambda: ANSWER)
    version: str = "1.0"
    started: list[int] = field(default_factory=list)

    def install(self) -> None:
        pass

    @contextmanager
    def serve(self, case) -> Iterator[Endpoint]:
        [port] = free_ports(1)
        url = f"http://127.0.0.1:{port}/predict"
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(port), json.dumps(self.answer)])
        self.started.append(server.pid)
        try:
            wait_for(lambda: answers(url))
            yield Endpoint(url, {"Content-Type": case.content_type}, b"twelve words", server.pid)
        finally:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    try:
        return requests.post(url, data=b"x", timeout=5).ok
    except requests.RequestException:
        return False


class DoesNotInstall(Small):
    def install(self) -> None:
        raise BundleError("uv cannot make it.", "no such package")


class DoesNotStart(Small):
    @contextmanager
    def serve(self, case) -> Iterator[Endpoint]:
        raise BundleError("The server ended.", "\n".join(f"line {number}" for number in range(100)))
        yield


class Breaks(Small):
    """Its server ends after the first answer."""

    @contextmanager
    def serve(self, case) -> Iterator[Endpoint]:
        with super().serve(case) as endpoint:
            psutil.Process(endpoint.pid).kill()
            psutil.Process(endpoint.pid).wait()
            yield endpoint


class Interrupted(Small):
    @contextmanager
    def serve(self, case) -> Iterator[Endpoint]:
        with super().serve(case):
            raise KeyboardInterrupt
        yield


@dataclass
class RecordedProgress:
    """Progress that a test can read."""

    planned: float = 0
    advanced: float = 0
    lines: list[str] = field(default_factory=list)

    def plan(self, seconds: float) -> None:
        self.planned += seconds

    def doing(self, what: str) -> None:
        pass

    def done(self, seconds: float) -> None:
        self.advanced += seconds

    def say(self, line: str) -> None:
        self.lines.append(line)


def runner(folder: Path, *systems: Small, rounds: int = 1, results: Results | None = None) -> Runner:
    plan = Plan([CASE], [*systems], rounds, seconds=0.3, warm_up=0, concurrencies=(1, 4))
    results = results or Results({}, 0.3, 0)
    return Runner(plan, results, folder / "results.json", RecordedProgress(), expected={CASE.name: (130, 0.985)})


def test_round_measures_every_system_and_ends_its_server(tmp_path: Path):
    ours, peer = Small("bundle"), Small("peer")
    run = runner(tmp_path, ours, peer)
    run.install()
    run.measure_round(CASE, 1)
    seen = run.results.measurements
    rates = {(one.system, one.rate_of): one.rate for one in seen if one.rate}
    best_of_peer = max(one.load.throughput for one in seen if one.system == "peer" and one.clients)
    assert [(one.system, one.clients) for one in seen if one.clients] == [
        ("peer", 1),
        ("peer", 4),
        ("bundle", 1),
        ("bundle", 4),
    ]
    assert rates.keys() == {("bundle", "bundle"), ("peer", "peer"), ("bundle", "peer")}
    assert rates["bundle", "peer"] == rates["peer", "peer"] == pytest.approx(0.7 * best_of_peer)
    assert all(one.load.answered > 0 for one in seen), [one.load for one in seen]
    assert all(one.load.failed == 0 for one in seen if one.clients), [
        one.load for one in seen
    ]  # a rate may be too high
    assert all(0 < one.cpu_seconds < 10 and 0 <= one.others < 1 and 5e6 < one.memory < 500e6 for one in seen)
    assert all(answer.is_right for answer in run.results.answers)
    assert Results.read(run.file) == run.results
    assert not any(psutil.pid_exists(pid) for pid in ours.started + peer.started)


@pytest.mark.parametrize(
    ("rates", "windows", "is_flat"),
    [
        ([100, 101, 102], 3, True),
        ([100, 200, 300, 310], 4, True),
        ([200, 100, 95.2], 3, True),
        ([200, 100, 94, 150, 149], 5, True),
        ([0] * 10, 10, False),
        ([100, 200] * 5, 10, False),
    ],
)
def test_warm_up_lasts_until_the_rate_is_flat(tmp_path: Path, monkeypatch, rates: list, windows: int, is_flat: bool):
    seen: list[tuple[int, float]] = []

    def closed(url: str, body: bytes, headers: dict, clients: int, seconds: float) -> LoadResult:
        seen.append((clients, seconds))
        return LoadResult(seconds, 1, 0, rates[len(seen) - 1], 1, 1, 1, 1)

    monkeypatch.setattr(bench, "closed_loop", closed)
    run = runner(tmp_path)
    run.plan = replace(run.plan, warm_up=30)
    assert run.warm_up("", Small("any"), CASE, 2, Endpoint("", {}, b"", 0)) == 3 * windows
    assert seen == [(4, 3)] * windows
    assert run.results.warm_ups == [WarmUp("text", "any", 2, 3 * windows, is_flat)]


def test_order_differs_in_each_round_and_the_bundle_is_last_in_the_first(tmp_path: Path):
    plan = runner(tmp_path, Small("bundle"), Small("one"), Small("two")).plan
    orders = [[system.name for system in plan.order(round_)] for round_ in (1, 2, 3, 4)]
    assert orders == [
        ["one", "two", "bundle"],
        ["bundle", "one", "two"],
        ["two", "bundle", "one"],
        ["one", "two", "bundle"],
    ]


def test_round_follows_its_order(tmp_path: Path):
    run = runner(tmp_path, Small("one"), Small("two"), rounds=2)
    for round_ in (1, 2):
        run.measure_round(CASE, round_)
    order = [(one.round, one.system) for one in run.results.measurements if one.clients == 1]
    assert order == [(1, "one"), (1, "two"), (2, "two"), (2, "one")]


def test_resumed_run_measures_only_what_is_incomplete(tmp_path: Path):
    """The first run was interrupted in the turn of the bundle, before its second open loop."""
    first = runner(tmp_path, Small("one"), DoesNotStart("two"), Small("bundle"))
    first.measure_round(CASE, 1)
    first.results.limits["text"] = {}
    del first.results.measurements[-1]
    first.results.save(first.file)

    again = [Small("one"), Small("two"), Small("bundle")]
    run = runner(tmp_path, *again, results=Results.read(first.file))
    run.expected.clear()
    whole = run.plan.turn_seconds(CASE)
    run.run()
    assert run.progress.planned == run.progress.advanced == pytest.approx(2 * whole)
    assert [len(system.started) for system in again] == [0, 1, 1]
    assert run.results.failures == []
    seen = [(one.system, one.clients or one.rate_of) for one in run.results.measurements]
    others = [("one", 1), ("one", 4), ("one", "one"), ("two", 1), ("two", 4), ("two", "two")]
    assert seen[:-1] == [*others, ("bundle", 1), ("bundle", 4), ("bundle", "bundle")]
    assert [answer.system for answer in run.results.answers] == ["one", "two", "bundle"]


def test_resumed_run_adds_rounds(tmp_path: Path):
    first = runner(tmp_path, Small("one"))
    first.measure_round(CASE, 1)
    run = runner(tmp_path, Small("one"), rounds=2, results=first.results)
    run.run()
    assert [one.round for one in run.results.measurements if one.clients == 1] == [1, 2]


def test_failed_system_does_not_stop_the_others(tmp_path: Path):
    run = runner(tmp_path, DoesNotInstall("a"), DoesNotStart("b"), Breaks("c"), Small("d"))
    run.install()
    run.measure_round(CASE, 1)
    assert {one.system for one in run.results.measurements} == {"d"}
    reasons = {failure.system: failure for failure in run.results.failures}
    assert reasons.keys() == {"a", "b", "c"}
    assert (reasons["a"].case, reasons["a"].details) == (None, "no such package")
    assert reasons["b"].details.splitlines()[-1] == "line 99"
    assert len(reasons["b"].details.splitlines()) == 20
    assert any("The server ended." in line for line in run.progress.lines)


def test_wrong_answer_is_recorded(tmp_path: Path):
    other = {"top_k": [{"label": "balance", "class": 6, "probability": 0.99}]}
    run = runner(tmp_path, Small("right"), Small("wrong", other))
    run.measure_round(CASE, 1)
    assert {answer.system: answer.is_right for answer in run.results.answers} == {"right": True, "wrong": False}


def test_best_peers_rate_ignores_peers_with_wrong_answers(tmp_path: Path):
    other = {"top_k": [{"label": "balance", "class": 6, "probability": 0.99}]}
    run = runner(tmp_path, Small("bundle"), Small("right"), Small("wrong", other))
    run.measure_round(CASE, 1)
    [again] = [one for one in run.results.measurements if one.rate and one.rate_of != one.system]
    assert (again.system, again.rate_of) == ("bundle", "right")
    assert run.peer_rates(CASE) == {"right": again.rate}
    assert any(one.rate_of == "wrong" for one in run.results.measurements)


def test_best_peers_rate_is_the_median_of_peers_with_few_failures(tmp_path: Path):
    run = runner(tmp_path)
    good = LoadResult(1, 1000, 0, 1000, 1, 1, 1, 1)
    rates = [("peer", (300, 500, 400), good), ("floor", (900,), good), ("failing", (800,), replace(good, failed=11))]
    for system, found, load in rates:
        for index, rate in enumerate(found):
            one = Measurement("text", system, index + 1, None, rate, system, load, 1, 0, 1)
            run.results.measurements.append(one)
    assert run.peer_rates(CASE) == {"peer": 400}


def test_failure_without_a_measurement_is_saved(tmp_path: Path):
    run = runner(tmp_path, DoesNotInstall("a"))
    run.plan.cases.clear()
    run.run()
    assert Results.read(run.file).failures == [Failure("a", None, None, "uv cannot make it.", "no such package")]


@pytest.mark.parametrize(
    ("soft", "hard", "expected"), [(256, 8192, "4096"), (5000, 8192, "5000"), (256, 1024, "ulimit")]
)
def test_limit_of_open_files_is_raised_or_reported(soft: int, hard: int, expected: str):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from loadtest.bench.runner import allow_open_files
allow_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert expected in ended.stdout + ended.stderr


def test_interrupt_keeps_the_results_and_ends_the_server(tmp_path: Path):
    first, second = Small("first"), Interrupted("second")
    run = runner(tmp_path, first, second)
    with pytest.raises(KeyboardInterrupt):
        run.measure_round(CASE, 1)
    assert {one.system for one in Results.read(run.file).measurements} == {"first"}
    assert not any(psutil.pid_exists(pid) for pid in first.started + second.started)


def test_progress_ends_at_the_planned_time(tmp_path: Path):
    run = runner(tmp_path, Small("bundle"), DoesNotStart("peer"), rounds=1)
    run.install()
    run.measure_round(CASE, 1)
    assert run.progress.advanced == pytest.approx(2 * run.plan.turn_seconds(CASE))


def test_usage_counts_the_whole_process_tree():
    work = "sum(range(20_000_000))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        alone = subprocess.run(
            [sys.executable, "-c", f"import time; {work}; print(time.process_time())"], capture_output=True, text=True
        )
        spent = usage.cpu_seconds((process.pid,))
        assert spent > 0.5 * float(alone.stdout)
        assert usage.memory((process.pid,)) > 1e6
        process.stdin.close()
    assert usage.cpu_seconds((process.pid,)) == 0  # it has ended


def test_usage_of_other_processes_is_measured():
    spin = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other, subprocess.Popen(["sleep", "600"]) as server:
        try:
            counted, ignored = usage.Meter((other.pid,)), usage.Meter((server.pid,))
            begin = time.monotonic()
            wait_for(lambda: counted.read()[0] > 1)
            spent, _ = counted.read()
            nothing, others = ignored.read()
            assert nothing < 0.1
            assert others > 0.7 * spent / ((time.monotonic() - begin) * psutil.cpu_count())
        finally:
            other.kill()
            server.kill()
