"""Finds settings of a model: workers x threads x batch size x delay x precision, by measuring them under load.

The goal is the highest throughput at which the 99th percentile of the latency stays within a target.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import get_args

import psutil
import requests
import torch

from bundle import mar
from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError, UsageError
from bundle.load.generator import Load
from bundle.tuning import search
from bundle.tuning.search import FINAL, Point, Score, Verdict
from bundle.tuning.space import Candidate, neighbours, space, spread
from bundle.tuning.trial_server import (
    Bench,
    Input,
    Service,
    largest_batch,
    precision_name,
    precision_of,
)
from handlers.core.precision import INT8_NAME, Precision

PRECISIONS = ("auto", *get_args(Precision))
ROOM = 0.6  # of the free memory, for the finalists side by side
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
RUNG_OVERHEAD = 0.4  # seconds: wrk's start, and the last answers


def check_precisions(names: list[str], current: str, folder: ModelFolder, archive: Path) -> None:
    """Raises:
    BundleError: the archive cannot be served in one of them, or must not.
    """
    if "int8" in names and INT8_NAME not in mar.names(archive):
        raise BundleError(f"{folder.name} has no int8 module. Ask for one in its {CONFIG_NAME}: bundle: int8: true")
    kept = precision_of(mar.config(archive))
    if kept == precision_of(folder.config):
        return
    right = {"float32", *([kept] if isinstance(kept, str) else kept)}
    if coarse := [name for name in names if name not in {current, *right}]:
        raise BundleError(
            f"Not {coarse[0]}: on its examples, {folder.name} is right in {', '.join(sorted(right))} only."
        )


def current_settings(folder: ModelFolder) -> Candidate:
    """What the folder's model-config.yaml says, and where it does not, TorchServe's defaults."""
    config, handler = folder.config, folder.config.get("handler") or {}
    return Candidate(
        workers=int(config.get("minWorkers") or 1),
        threads=int(handler.get("threads") or 1),
        batch_size=int(config.get("batchSize") or 1),
        delay=int(config.get("maxBatchDelay") or 100),  # TorchServe takes 0 for 100
        precision=precision_name(precision_of(config)),
    )


def read_inputs(folder: ModelFolder, files: Sequence[Path]) -> list[Input]:
    """Read the files, or the folder's own sample.

    Raises:
        UsageError: there is none.
    """
    if not files and folder.sample_file is None:
        raise UsageError(f"{folder.name} has no sample of its own. Name what to send: --input FILE")
    for file in files or [folder.existing(folder.bundle.sample)]:
        if not file.is_file():
            raise UsageError(f"There is no file {file}.")
    return [Input(file, file.read_bytes()) for file in files or [folder.sample_file]]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def cores() -> int:
    """Of this process: physical ones, for two threads on one core's halves get in each other's way; in a container, no
    more than its share of processor time.
    """
    usable = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    return max(1, min(usable, round(quota(CPU_QUOTA))))


def quota(file: Path) -> float:
    """Cores' worth of time that a control group may use (Linux, cgroup v2); without a limit, the number of all."""
    try:
        time_allowed, period = file.read_text().split()
        return int(time_allowed) / int(period)
    except (OSError, ValueError):  # no such file; "max 100000"
        return os.cpu_count() or 1


class Tuning:
    """One search.

    Args:
        target: seconds that the 99th percentile may take.
        budget: seconds for all of it.
        show: is told what is going on, and the best score so far.

    Attributes:
        points: everything that was measured, in order.
        broken: candidates that could not be served, and why.
        precisions: what the candidates computed in.
    """

    def __init__(
        self,
        bench: Bench,
        current: Candidate,
        precisions: list[str],
        target: float,
        budget: float,
        show: Callable[[str, Score | None], None],
    ):
        self.bench, self.current, self.precisions_wanted = bench, current, precisions
        self.target, self.budget, self.show = target, budget, show
        self.deadline = time.monotonic() + budget
        self.points: list[Point] = []
        self.broken: dict[Candidate, str] = {}
        self.precisions: dict[Candidate, str] = {}
        self.candidates: list[Candidate] = []
        self.final: dict[Candidate, list[dict[int, Load]]] = {}
        self.steady: dict[Candidate, Load] = {}
        self.best: tuple[Score, Candidate] | None = None
        self.scores: dict[Candidate, Score] = {}
        self.memory: dict[Candidate, int] = {}
        self.starts: list[float] = []
        self.shortest = search.SHORTEST
        self.timeout = max(10.0, 2 * target)

    def run(self) -> Verdict:
        """Raises:
        BundleError: the current settings cannot be served, or nothing reaches the target.
        """
        field = self.field()
        self.finals(search.halve(field, self.judge, lambda leader: neighbours(self.candidates, leader)))
        verdict = search.decide(self.final, self.steady, self.current, self.target)
        if not verdict.scores[verdict.best].throughput:
            raise BundleError(f"No tested settings meet the p99 target of {1000 * self.target:g} ms. {self.nearest()}")
        return verdict

    def nearest(self) -> str:
        whole = [point for point in self.points if point.load.answered and not point.load.failed]
        if not whole:
            return "None of them answered without failures."
        point = min(whole, key=lambda point: point.load.p99)
        load = point.load
        early = " It met the target early on but not in the final; the machine may have been busy."
        return (
            f"Closest: {1000 * load.p99:.3g} ms at {load.throughput:.3g} answers/s "
            f"and {point.concurrency} clients, with {point.candidate}." + (early if load.p99 <= self.target else "")
        )

    def field(self) -> list[Candidate]:
        """The current settings are measured first: they show what a start, an answer and a request cost here."""
        self.say(f"round 1, as it is: {self.current.short()}")
        with self.bench.started(self.current) as service:
            self.learn(service)
            alone = service.load(1, search.SHORTEST, timeout=self.timeout)
            self.shortest = search.shortest(alone.p50, len(self.bench.inputs))
            self.climb(service, "round 1", search.COARSE, self.shortest)
        limit = largest_batch(int(self.bench.server.settings["max_response_size"]), service.answer_bytes)
        waited = self.current.delay / 1000 if self.current.batch_size > 1 else 0
        longest_delay = min(
            self.target / 2, alone.p50 - waited
        )  # so that waiting at most doubles a lone request's time
        largest_load = search.LARGEST_LOAD
        self.candidates = space(cores(), self.precisions_wanted, limit, largest_load, longest_delay, on_gpu())
        left = self.deadline - time.monotonic()
        count = search.affordable(left, self.start_seconds(), self.shortest + RUNG_OVERHEAD)
        return spread(self.candidates, self.current, count)

    def judge(self, field: Sequence[Candidate], number: int, rounds_left: int) -> dict[Candidate, Score]:
        """A round: each candidate is started, and loaded as long as the round's share of the time allows."""
        left = self.deadline - time.monotonic()
        share = left / rounds_left
        until = time.monotonic() + 1.5 * share
        rungs = len(field) * search.EXPECTED_RUNGS
        seconds = search.seconds_at_a_rung(share, len(field), self.start_seconds(), rungs, self.shortest)
        scores = {}
        for place, candidate in enumerate(field, 1):
            if number == 1 and candidate in self.scores:
                scores[candidate] = self.scores[candidate]
                continue
            enough = number > 1 or len(scores) >= search.FINALISTS  # however short the time, something is compared
            if enough and time.monotonic() > until:
                break
            stage = f"round {number}"
            self.say(f"{stage}, {place}/{len(field)}: {candidate.short()}")
            with self.spared(candidate), self.bench.started(candidate) as service:
                self.learn(service)
                scores[candidate] = self.climb(service, stage, self.rungs(candidate), seconds)
        return scores

    def finals(self, finalists: Sequence[Candidate]) -> None:
        """The finalists and the current settings, in turns, so that whatever disturbs the machine disturbs them all."""
        entrants = list(dict.fromkeys([*finalists, self.current]))
        free = ROOM * psutil.virtual_memory().available
        together = sum(self.memory.get(entrant, 0) for entrant in entrants) < free and not on_gpu()
        starts = len(entrants) * (1 if together else search.REPEATS)
        rungs = search.REPEATS * search.EXPECTED_RUNGS * len(entrants)
        left = self.deadline - time.monotonic()
        seconds = search.seconds_at_a_rung(
            left - rungs * RUNG_OVERHEAD, starts, self.start_seconds(), rungs, self.shortest
        )
        self.final = {entrant: [] for entrant in entrants}
        with ExitStack() as stack:
            served = {}
            for entrant in entrants if together else []:
                self.say(f"final, start: {entrant.short()}")
                with self.spared(entrant):
                    served[entrant] = stack.enter_context(self.bench.started(entrant))
            for turn in range(search.REPEATS):
                for entrant in list(self.final):
                    self.say(f"final {turn + 1}/{search.REPEATS}: {entrant.short()}")
                    opened = nullcontext(served[entrant]) if together else self.bench.started(entrant)
                    with self.spared(entrant), opened as service:
                        self.final[entrant].append(self.turn(service, seconds))
                        if turn == search.REPEATS - 1:
                            self.steady |= self.random_arrivals(service, seconds)

    def turn(self, service: Service, seconds: float) -> dict[int, Load]:
        """Finds its own loads, lest a disturbed turn decide for the others, and repeats those of the earlier turns."""
        candidate = service.candidate

        def measure(concurrency: int) -> Load:
            return self.measure(service, FINAL, concurrency, seconds)

        loads = search.climb(measure, self.rungs(candidate), self.target)
        missing = set().union(*self.final[candidate]) - set(loads)
        return loads | {concurrency: measure(concurrency) for concurrency in sorted(missing)}

    def random_arrivals(self, service: Service, seconds: float) -> dict[Candidate, Load]:
        """None for a candidate that missed the target anyway."""
        throughput = search.score(search.medians(self.final[service.candidate]), self.target).throughput
        if not throughput:
            return {}
        self.say(f"final, random arrivals: {service.candidate.short()}")
        return {service.candidate: service.random_arrivals(search.UTILISATION * throughput, seconds, self.timeout)}

    def rungs(self, candidate: Candidate) -> Sequence[int]:
        """Coarse for one that is new, fine near its best for one that was measured."""
        known = self.scores.get(candidate)
        return search.rising(known.concurrency) if known else search.COARSE

    def climb(self, service: Service, stage: str, steps: Sequence[int], seconds: float) -> Score:
        loads = search.climb(lambda step: self.measure(service, stage, step, seconds), steps, self.target)
        score = self.scores[service.candidate] = search.score(loads, self.target)
        if self.best is None or score > self.best[0]:
            self.best = score, service.candidate
        return score

    def measure(self, service: Service, stage: str, concurrency: int, seconds: float) -> Load:
        load = service.load(concurrency, seconds, timeout=self.timeout)
        self.points.append(Point(service.candidate, stage, concurrency, load))
        return load

    def learn(self, service: Service) -> None:
        self.starts.append(service.start_seconds)
        self.memory[service.candidate] = service.memory
        self.precisions[service.candidate] = service.precision

    @contextmanager
    def spared(self, candidate: Candidate) -> Iterator[None]:
        """A candidate that cannot be served is out; without a server, or the current settings, all is."""
        try:
            yield
        except (BundleError, requests.RequestException) as error:
            if not self.bench.lives():
                raise BundleError(f"TorchServe ended while it served {candidate}.", str(error)) from error
            if candidate == self.current:
                raise
            self.broken[candidate] = str(error)
            self.final.pop(candidate, None)

    def start_seconds(self) -> float:
        """The mean of the starts so far; the end of a candidate is short."""
        return sum(self.starts) / len(self.starts)

    def say(self, doing: str) -> None:
        self.show(doing, self.best[0] if self.best else None)
