"""The measurement: every system with every case, interleaved, one at a time."""

import functools
import json
import math
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import requests

from bundle.errors import BundleError
from bundle.load.generator import LoadResult, closed_loop, open_loop
from loadtest.bench import usage
from loadtest.bench.cases import Case
from loadtest.bench.paths import ROOT
from loadtest.bench.results import (
    CONNECTIONS,
    FEWEST,
    FLAT,
    LIMIT,
    OURS,
    UTILISATION,
    WINDOWS,
    ComparedAnswer,
    Failure,
    Limit,
    Measurement,
    Results,
    WarmUp,
    few_failed,
    is_peer,
)
from loadtest.bench.systems.base import Endpoint, System

OPEN_FILES = 4096  # enough for wrk and for each server
START_GUESS = 10.0  # seconds to start and stop a system
LOOP_GUESS = 0.8  # seconds to start and end the load generator
WINDOWS_GUESS = 4  # of a warm-up
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
        warm_up: longest time of load before the first of these, in seconds; 0 for none.
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

    def turn_seconds(self, case: Case) -> float:
        """Return the estimated seconds of one system in one round."""
        windows = WINDOWS_GUESS * (self.warm_up / WINDOWS + LOOP_GUESS) if self.warm_up else 0
        return START_GUESS + windows + (self.seconds + LOOP_GUESS) * (len(self.clients(case)) + 1)

    def order(self, round_: int) -> list[System]:
        """Return the systems in the order of a round.

        The bundle is the last one in the first round, because it is also measured at the best peer's rate.
        """
        systems = sorted(self.systems, key=lambda system: system.name == OURS)
        shift = (round_ - 1) % max(1, len(systems))
        return systems[len(systems) - shift :] + systems[: len(systems) - shift]


@dataclass
class Runner:
    """A runner of a plan.

    Attributes:
        results: the results so far. What they have of the plan is not measured again.
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

    @property
    def guess(self) -> float:
        """The estimated seconds of what is left of the plan."""
        left = sum(case.name not in self.expected for case in self.plan.cases) * LIMIT_GUESS
        for case in self.plan.cases:
            turns = [(system.name, round_) for system in self.plan.systems for round_ in self.rounds]
            left += sum(not self.is_complete(case, *turn) for turn in turns) * self.plan.turn_seconds(case)
        return left

    @property
    def rounds(self) -> range:
        return range(1, self.plan.rounds + 1)

    def run(self) -> None:
        self.drop_incomplete()
        self.progress.plan(self.guess)
        try:
            self.install()
            for case in self.plan.cases:
                if case.name not in self.expected:
                    self.measure_limit(case)
                for round_ in self.rounds:
                    self.measure_round(case, round_)
        finally:
            self.results.save(self.file)  # includes the failures since the last measurement

    def is_complete(self, case: Case, system: str, round_: int) -> bool:
        """Return whether a system was measured at all numbers of clients, and in its one or two open loops."""
        seen = [
            one for one in self.results.measurements if (one.case, one.system, one.round) == (case.name, system, round_)
        ]
        closed = {one.clients for one in seen if one.clients}
        opened = sum(one.rate is not None for one in seen)
        is_compared = system == OURS and bool(self.peer_rates(case))
        wanted = is_compared + any(few_failed([one.load]) and one.load.throughput for one in seen if one.clients)
        return closed >= {*self.plan.clients(case)} and opened >= wanted

    def drop_incomplete(self) -> None:
        """Drop what an interrupted or failed turn left in the results: the system is measured again."""
        results, known = self.results, {case.name: case for case in self.plan.cases}

        @functools.cache
        def is_kept(case: str | None, system: str, round_: int | None) -> bool:
            if case in known:
                return round_ is not None and self.is_complete(known[case], system, round_)
            return case is not None

        results.keep(is_kept)
        limited = [answer for answer in results.answers if answer.case in results.limits]
        self.expected |= {answer.case: answer.expected for answer in limited}

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
        for system in self.plan.order(round_):
            if self.is_complete(case, system.name, round_):
                continue
            if system.name not in self.missing:
                with self.record_failures(system.name, case.name, round_):
                    self.measure_system(system, case, round_)
            self.progress.done(self.plan.turn_seconds(case))

    def measure_system(self, system: System, case: Case, round_: int) -> None:
        """Measure a system at every number of clients, then in an open loop; the bundle also at the best peer's rate.

        The rate of the open loop is a share of the best throughput that had few failures.
        """
        where = f"{case.name}: {system.name}, round {round_}"
        self.progress.doing(f"{where}: start")
        with system.serve(case) as endpoint:
            self.compare_answer(system, case, round_, endpoint)
            clients = self.plan.clients(case)
            warmed = self.warm_up(where, system, case, round_, endpoint)
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
            if system.name == OURS and (rates := self.peer_rates(case)):
                peer = max(rates, key=rates.__getitem__)
                self.progress.doing(f"{where}: open loop at the rate of {peer}")
                with self.record_failures(system.name, case.name, round_):
                    self.measure(system, case, round_, endpoint, rate=rates[peer], rate_of=peer)
            self.progress.say(f"{where}: {best:,.0f} requests/s, warm after {warmed:.0f} s")

    def peer_rates(self, case: Case) -> dict[str, float]:
        """Return the median rate of each peer's open loops so far, without peers that are not sound."""
        opened: dict[str, list[Measurement]] = defaultdict(list)
        for one in self.results.measurements:
            if one.case == case.name and one.rate and is_peer(one.system):
                opened[one.system].append(one)
        return {
            peer: median([one.rate for one in seen if one.rate])
            for peer, seen in opened.items()
            if self.results.is_sound(case.name, peer, seen)
        }

    def warm_up(self, where: str, system: System, case: Case, round_: int, endpoint: Endpoint) -> float:
        """Send load with the most clients until the rate no longer changes, and return how many seconds it took."""
        if not self.plan.warm_up:
            return 0
        self.progress.doing(f"{where}: warm up")
        window, clients, rates = self.plan.warm_up / WINDOWS, max(self.plan.clients(case)), list[float]()
        while len(rates) < FEWEST or not is_flat(rates) and len(rates) < WINDOWS:
            rates.append(closed_loop(endpoint.url, endpoint.body, endpoint.headers, clients, window).throughput)
        seconds = window * len(rates)
        self.results.warm_ups.append(WarmUp(case.name, system.name, round_, seconds, is_flat(rates)))
        return seconds

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


def is_flat(rates: list[float]) -> bool:
    """Return whether the last two rates differ by less than FLAT."""
    before, last = rates[-2:]
    return abs(last - before) < FLAT * max(last, before)


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
