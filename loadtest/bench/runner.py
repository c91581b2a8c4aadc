"""The measurement: every system with every case, interleaved, one at a time."""

import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import requests

from bundle.errors import BundleError
from bundle.load.generator import LoadResult, closed_loop, open_loop
from loadtest.bench import usage
from loadtest.bench.cases import Case
from loadtest.bench.paths import ROOT
from loadtest.bench.results import (
    CONNECTIONS,
    LIMIT,
    OURS,
    UTILISATION,
    ComparedAnswer,
    Failure,
    Limit,
    Measurement,
    Results,
    few_failed,
)
from loadtest.bench.systems.base import Endpoint, System

OPEN_FILES = 4096  # enough for wrk and for each server
START_GUESS = 20.0  # seconds to start and stop a system
LIMIT_GUESS = 45.0  # seconds to measure the limit of a case
LOG_LINES = 20  # last lines of a log that a failure keeps


class Progress(Protocol):
    """A display of the runner's progress."""

    def plan(self, seconds: float) -> None:
        """Show how many seconds the whole plan takes."""

    def doing(self, what: str) -> None: ...

    def done(self, seconds: float) -> None:
        """Show that this many more seconds of the plan are done."""

    def say(self, line: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The plan of the measurements.

    Attributes:
        rounds: how often each system is started and measured.
        seconds: length of each run of the load generator.
        warm_up: seconds of load before the first of these.
        concurrencies: numbers of clients; None for those of each case.
    """

    cases: list[Case]
    systems: list[System]
    rounds: int
    seconds: float
    warm_up: float
    concurrencies: tuple[int, ...] | None = None

    def clients(self, case: Case) -> tuple[int, ...]:
        return self.concurrencies or case.concurrencies

    @property
    def compares(self) -> bool:
        """Whether the bundle and at least one peer are measured."""
        return len(self.systems) > 1 and any(system.name == OURS for system in self.systems)

    def system_seconds(self, case: Case) -> float:
        return START_GUESS + self.warm_up + self.seconds * (len(self.clients(case)) + 1)

    @property
    def guess(self) -> float:
        """The estimated seconds of the whole plan."""
        systems = sum((len(self.systems) + self.compares) * self.system_seconds(case) for case in self.cases)
        return len(self.cases) * LIMIT_GUESS + self.rounds * systems


@dataclass
class Runner:
    """A runner of a plan.

    Attributes:
        results: the results so far.
        file: where `results` is saved after every measurement.
        expected: the reference's first class and its probability, by case.
        missing: names of the systems that could not be installed.
    """

    plan: Plan
    results: Results
    file: Path
    progress: Progress
    expected: dict[str, tuple[int, float]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    def run(self) -> None:
        self.progress.plan(self.plan.guess)
        try:
            self.install()
            for case in self.plan.cases:
                self.measure_limit(case)
                for round_ in range(1, self.plan.rounds + 1):
                    self.measure_round(case, round_)
        finally:
            self.results.save(self.file)  # includes the failures since the last measurement

    def install(self) -> None:
        for system in self.plan.systems:
            self.progress.doing(f"install {system.name}")
            with self.record_failures(system.name, None, None):
                system.install()
                self.results.versions[system.name] = system.version
                continue
            self.missing.add(system.name)

    def measure_limit(self, case: Case) -> None:
        self.progress.doing(f"{case.name}: in-process limit")
        with self.record_failures(LIMIT, case.name, None):
            command = [sys.executable, "-m", "loadtest.bench.limit", case.name]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if run.returncode:
                raise BundleError("The limit could not be measured.", last_lines(run.stderr))
            output = json.loads(run.stdout.splitlines()[-1])
            self.expected[case.name] = tuple(output["expected"])
            self.results.limits[case.name] = {kind: Limit(**limit) for kind, limit in output["limits"].items()}
            rates = ", ".join(f"{kind} {limit['rate']:,.0f}/s" for kind, limit in output["limits"].items())
            self.progress.say(f"{case.name}: in-process limit: {rates}")
        self.progress.done(LIMIT_GUESS)

    def measure_round(self, case: Case, round_: int) -> None:
        systems = [system for system in self.plan.systems if system.name not in self.missing]
        shift = (round_ - 1) % max(1, len(systems))
        for system in systems[shift:] + systems[:shift]:
            with self.record_failures(system.name, case.name, round_):
                self.measure_system(system, case, round_)
            self.progress.done(self.plan.system_seconds(case))
        if self.plan.compares:
            ours = [system for system in systems if system.name == OURS and self.is_measured(system, case, round_)]
            for system in ours:
                self.measure_at_peer_rate(system, case, round_)
            self.progress.done(self.plan.system_seconds(case))

    def measure_system(self, system: System, case: Case, round_: int) -> None:
        """Measure a system at every number of clients, then in an open loop.

        The rate of the open loop is a share of the best throughput that had few failures.
        """
        where = f"{case.name}: {system.name}, round {round_}"
        self.progress.doing(f"{where}: start")
        with system.serve(case) as endpoint:
            self.compare_answer(system, case, round_, endpoint)
            clients = self.plan.clients(case)
            self.warm_up(where, endpoint, max(clients), self.plan.warm_up)
            best = 0.0
            for count in clients:
                self.progress.doing(f"{where}: {count} clients")
                with self.record_failures(system.name, case.name, round_):
                    load = self.measure(system, case, round_, endpoint, clients=count)
                    best = max(best, load.throughput if few_failed([load]) else 0)
            if best:
                self.progress.doing(f"{where}: open loop")
                with self.record_failures(system.name, case.name, round_):
                    self.measure(system, case, round_, endpoint, rate=UTILISATION * best, rate_of=system.name)
            self.progress.say(f"{where}: {best:,.0f} requests/s")

    def measure_at_peer_rate(self, system: System, case: Case, round_: int) -> None:
        """Measure the bundle at the rate of the best peer's open loop: latencies compare at equal rates only."""
        where = f"{case.name}: {system.name} at the best peer's rate, round {round_}"
        peers = [
            (one.rate, one.system)
            for one in self.results.measurements
            if one.rate and (one.case, one.round) == (case.name, round_) and one.system != OURS
            if self.results.is_sound(case.name, one.system, [one])
        ]
        if peers:
            rate, peer = max(peers)
            self.progress.doing(where)
            with self.record_failures(system.name, case.name, round_), system.serve(case) as endpoint:
                # the JVM compiles while it runs: the bundle gets as much load before its open loop as the peer did
                seconds = self.plan.warm_up + self.plan.seconds * len(self.plan.clients(case))
                self.warm_up(where, endpoint, max(self.plan.clients(case)), seconds)
                self.measure(system, case, round_, endpoint, rate=rate, rate_of=peer)

    def is_measured(self, system: System, case: Case, round_: int) -> bool:
        seen = {(one.system, one.case, one.round) for one in self.results.measurements}
        return (system.name, case.name, round_) in seen

    def warm_up(self, where: str, endpoint: Endpoint, clients: int, seconds: float) -> None:
        self.progress.doing(f"{where}: warm up")
        if seconds:
            closed_loop(endpoint.url, endpoint.body, endpoint.headers, clients, seconds)

    def compare_answer(self, system: System, case: Case, round_: int, endpoint: Endpoint) -> None:
        if case.name not in self.expected:
            return
        with requests.Session() as session:
            session.trust_env = False
            answer = session.post(endpoint.url, data=endpoint.body, headers=endpoint.headers, timeout=60)
        seen = endpoint.top(answer.content)
        self.results.answers.append(ComparedAnswer(case.name, system.name, round_, seen, self.expected[case.name]))

    def measure(
        self,
        system: System,
        case: Case,
        round_: int,
        endpoint: Endpoint,
        clients: int | None = None,
        rate: float | None = None,
        rate_of: str | None = None,
    ) -> LoadResult:
        roots = (endpoint.pid, *endpoint.pids)
        meter = usage.Meter(roots)
        target = (endpoint.url, endpoint.body, endpoint.headers)
        if rate is None:
            assert clients is not None
            load = closed_loop(*target, clients, self.plan.seconds)
        else:
            load = open_loop(*target, rate, self.plan.seconds, connections(rate * self.plan.seconds))
        used, others = meter.read()
        self.results.measurements.append(
            Measurement(case.name, system.name, round_, clients, rate, rate_of, load, used, others, usage.memory(roots))
        )
        self.results.save(self.file)
        return load

    @contextmanager
    def record_failures(self, system: str, case: str | None, round_: int | None) -> Iterator[None]:
        """Record an exception of the block as a failure in the results; the rest of the plan continues."""
        try:
            yield
        except Exception as exc:
            message = str(exc) if isinstance(exc, BundleError) else f"{type(exc).__name__}: {exc}"
            details = last_lines(exc.details) if isinstance(exc, BundleError) else ""
            self.results.failures.append(Failure(system, case, round_, message, details))
            self.progress.say(f"{system}{f', {case}' if case else ''}: {message}")


def connections(requests: float) -> int:
    """Return a number of connections with which no request of an open loop waits in the load generator.

    Args:
        requests: average number of requests of the loop.
    """
    at_most = requests + 5 * math.sqrt(requests)  # they are due at random times: five standard deviations more
    return min(CONNECTIONS, math.ceil(at_most))


def allow_open_files() -> None:
    """Raise the limit of open files, for this process and its children, to what the connections need.

    Raises:
        BundleError: the hard limit is too low.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < OPEN_FILES:
        if most != resource.RLIM_INFINITY and most < OPEN_FILES:
            raise BundleError(
                f"The benchmark needs {OPEN_FILES:,} open files, and {most:,} are allowed. Raise the limit: ulimit -n"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, most))


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])
