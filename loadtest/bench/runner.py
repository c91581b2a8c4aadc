"""The measurement itself: every system with every case, interleaved, one at a time."""

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
    Answer,
    Failure,
    Limit,
    Measurement,
    Results,
    few_failed,
)
from loadtest.bench.systems.base import Endpoint, System

OPEN_FILES = 4096  # that wrk and each server may need: wrk has two for a connection of an open loop
START_GUESS = 20.0  # seconds to start and stop a system, before one has been seen
LIMIT_GUESS = 45.0  # seconds to measure a case's limit
LOG_LINES = 20


class Progress(Protocol):
    """What the runner tells of itself."""

    def plan(self, seconds: float) -> None:
        """So many seconds are still to come."""

    def doing(self, what: str) -> None: ...

    def done(self, seconds: float) -> None:
        """So many seconds of the plan are done."""

    def say(self, line: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        concurrencies: numbers of clients; None: each case's own.
        seconds: of each run of the load generator.
        warm_up: seconds of load before the first of them.
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
        """Whether the bundle is measured beside others."""
        return len(self.systems) > 1 and any(system.name == OURS for system in self.systems)

    def visit_seconds(self, case: Case) -> float:
        return START_GUESS + self.warm_up + self.seconds * (len(self.clients(case)) + 1)

    @property
    def guess(self) -> float:
        """Seconds that all of it takes."""
        visits = sum((len(self.systems) + self.compares) * self.visit_seconds(case) for case in self.cases)
        return len(self.cases) * LIMIT_GUESS + self.rounds * visits


@dataclass
class Runner:
    """Measures a plan. `results` has what there is, at any time, and is saved to `file` after every measurement."""

    plan: Plan
    results: Results
    file: Path
    progress: Progress
    expected: dict[str, tuple[int, float]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)  # systems that could not be installed

    def run(self) -> None:
        self.progress.plan(self.plan.guess)
        try:
            self.install()
            for case in self.plan.cases:
                self.measure_limit(case)
                for round_ in range(1, self.plan.rounds + 1):
                    self.measure_round(case, round_)
        finally:
            self.results.save(self.file)  # with the failures since the last measurement

    def install(self) -> None:
        for system in self.plan.systems:
            self.progress.doing(f"install {system.name}")
            with self.noting(system.name, None, None):
                system.install()
                self.results.versions[system.name] = system.version
                continue
            self.missing.add(system.name)

    def measure_limit(self, case: Case) -> None:
        self.progress.doing(f"{case.name}: in-process limit")
        with self.noting(LIMIT, case.name, None):
            command = [sys.executable, "-m", "loadtest.bench.limit", case.name]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if run.returncode:
                raise BundleError("The limit could not be measured.", last_lines(run.stderr))
            said = json.loads(run.stdout.splitlines()[-1])
            self.expected[case.name] = tuple(said["expected"])
            self.results.limits[case.name] = {kind: Limit(**limit) for kind, limit in said["limits"].items()}
            told = ", ".join(f"{kind} {limit['rate']:,.0f}/s" for kind, limit in said["limits"].items())
            self.progress.say(f"{case.name}: in-process limit: {told}")
        self.progress.done(LIMIT_GUESS)

    def measure_round(self, case: Case, round_: int) -> None:
        systems = [system for system in self.plan.systems if system.name not in self.missing]
        shift = (round_ - 1) % max(1, len(systems))
        for system in systems[shift:] + systems[:shift]:
            with self.noting(system.name, case.name, round_):
                self.visit(system, case, round_)
            self.progress.done(self.plan.visit_seconds(case))
        if self.plan.compares:
            ours = [system for system in systems if system.name == OURS and self.is_measured(system, case, round_)]
            for system in ours:
                self.revisit(system, case, round_)
            self.progress.done(self.plan.visit_seconds(case))

    def visit(self, system: System, case: Case, round_: int) -> None:
        """Every number of clients, and the open loop at a share of the best throughput that was reached without many
        failures.
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
                with self.noting(system.name, case.name, round_):
                    load = self.measure(system, case, round_, endpoint, clients=count)
                    best = max(best, load.throughput if few_failed([load]) else 0)
            if best:
                self.progress.doing(f"{where}: open loop")
                with self.noting(system.name, case.name, round_):
                    self.measure(system, case, round_, endpoint, rate=UTILISATION * best, rate_of=system.name)
            self.progress.say(f"{where}: {best:,.0f} requests/s")

    def revisit(self, system: System, case: Case, round_: int) -> None:
        """The bundle at the rate of the best peer's open loop: latencies compare at equal rates only."""
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
            with self.noting(system.name, case.name, round_), system.serve(case) as endpoint:
                # what the JVM has compiled by then tells: as much load goes before as before the peer's open loop
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
        self.results.answers.append(Answer(case.name, system.name, round_, seen, self.expected[case.name]))

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
        if clients:
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
    def noting(self, system: str, case: str | None, round_: int | None) -> Iterator[None]:
        """Whatever goes wrong in the block is reported with the results; the rest of the plan goes on."""
        try:
            yield
        except Exception as exc:
            message = str(exc) if isinstance(exc, BundleError) else f"{type(exc).__name__}: {exc}"
            details = last_lines(exc.details) if isinstance(exc, BundleError) else ""
            self.results.failures.append(Failure(system, case, round_, message, details))
            self.progress.say(f"{system}{f', {case}' if case else ''}: {message}")


def connections(requests: float) -> int:
    """Of an open loop of so many requests on average, one for each of them: none waits in the load generator."""
    at_most = requests + 5 * math.sqrt(requests)  # they come at random: five standard deviations more
    return min(CONNECTIONS, math.ceil(at_most))


def allow_open_files() -> None:
    """Lets this process, and what it starts, open as many files as the connections need.

    Raises:
        BundleError: it is not allowed to.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < OPEN_FILES:
        if most != resource.RLIM_INFINITY and most < OPEN_FILES:
            raise BundleError(f"The benchmark needs {OPEN_FILES:,} open files, and {most:,} are allowed: ulimit -n.")
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, most))


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])
