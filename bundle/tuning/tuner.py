"""Search the fastest settings of a model by measuring them under load.

The settings are workers, threads, batch size, precision and, where batches wait to fill, the delay. The goal is the
highest throughput at which the p99 latency stays within a target.
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
from bundle.load.generator import LoadResult
from bundle.server import frontend
from bundle.tuning import search
from bundle.tuning.search import FINAL, Point, Score, Verdict
from bundle.tuning.space import Candidate, delays_up_to, neighbours, space, spread
from bundle.tuning.trial_server import (
    Input,
    Service,
    TrialServer,
    largest_batch,
    precision_name,
    precision_of,
)
from handlers.core.precision import INT8_NAME, Precision

PRECISIONS = ("auto", *get_args(Precision))
ROOM = 0.6  # share of the free memory that finalists served at the same time may take
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
RUNG_OVERHEAD = 0.4  # seconds of a measurement for wrk's start and the last answers


def check_precisions(names: list[str], current: str, folder: ModelFolder, archive: Path) -> None:
    """Check that the archive can be served in these precisions.

    Args:
        current: the folder's own setting, which is always allowed.

    Raises:
        BundleError: the archive has no int8 module, or a precision is not accurate enough.
    """
    if "int8" in names and INT8_NAME not in mar.names(archive):
        raise BundleError(f"{folder.name} has no int8 module. Set bundle: int8: true in its {CONFIG_NAME}.")
    kept = precision_of(mar.config(archive))
    if kept == precision_of(folder.config):
        return
    accurate = {"float32", *([kept] if isinstance(kept, str) else kept)}
    if inaccurate := [name for name in names if name not in {current, *accurate}]:
        raise BundleError(
            f"{folder.name} is not accurate enough in {inaccurate[0]} on its examples. Choose among: "
            f"{', '.join(sorted(accurate))}."
        )


def current_settings(folder: ModelFolder) -> Candidate:
    """Return the settings of the folder's model-config.yaml, with TorchServe's defaults for those that are missing."""
    config, handler = folder.config, folder.config.get("handler") or {}
    return Candidate(
        workers=int(config.get("minWorkers") or 1),
        threads=int(handler.get("threads") or 1),
        batch_size=int(config.get("batchSize") or 1),
        delay=int(config.get("maxBatchDelay") or 100),  # TorchServe takes 0 as 100
        precision=precision_name(precision_of(config)),
    )


def waits_to_fill(folder: ModelFolder) -> bool:
    """Return whether a batch of this model waits for `maxBatchDelay`, as without the frontend's patch `gather`."""
    return folder.config.get("patience") == "fixed" or frontend.is_off(os.environ, "gather")


def read_inputs(folder: ModelFolder, files: Sequence[Path]) -> list[Input]:
    """Read the files or, without files, the folder's sample.

    Raises:
        BundleError: a file is missing, or there are no files and the folder has no sample.
    """
    if not files:
        if folder.bundle.sample is None:
            raise UsageError(f"{folder.name} has no sample. Name a file to send: --input FILE")
        files = [folder.existing(folder.bundle.sample)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"There is no file {file}.")
    return [Input(file, file.read_bytes()) for file in files]


def on_gpu() -> bool:
    """Return whether the workers compute on a GPU."""
    return torch.cuda.is_available()


def cores() -> int:
    """Return the number of cores that this process can use.

    Physical cores, because two threads on one physical core slow each other down. In a container, not more than its
    share of processor time.
    """
    usable = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    return max(1, min(usable, round(quota(CPU_QUOTA))))


def quota(file: Path) -> float:
    """Return the limit of a control group's processor time, in cores (Linux, cgroup v2); else the number of cores."""
    try:
        time_allowed, period = file.read_text().split()
        return int(time_allowed) / int(period)
    except (OSError, ValueError):  # no such file; "max 100000"
        return os.cpu_count() or 1


class Tuning:
    """The rounds and the final of one search.

    Args:
        trial_server: serves the candidates.
        current: the current settings.
        precisions: the precisions to try.
        waits: whether a batch waits to fill; if not, the delay has no effect, and stays as it is.
        target: of the p99 latency, in seconds.
        budget: how long to search, in seconds.
        show: receives the current step, and the best score so far.

    Attributes:
        points: every measurement, in order.
        broken: the candidates that could not be served, and why.
        precisions: the precision that each candidate computed in.
        candidates: every candidate that is worth trying.
        final: for each finalist, the measurements by concurrency, of each turn.
        steady: for each finalist that kept the target, its last measurement with requests at random times.
        best: the best score so far, and its candidate.
        scores: the last score of each candidate.
        memory: the workers' resident memory of each candidate, in bytes.
        starts: how long each start took, in seconds.
    """

    def __init__(
        self,
        trial_server: TrialServer,
        current: Candidate,
        precisions: list[str],
        waits: bool,
        target: float,
        budget: float,
        show: Callable[[str, Score | None], None],
    ):
        self.trial_server, self.current, self.precisions_wanted = trial_server, current, precisions
        self.waits = waits
        self.target, self.budget, self.show = target, budget, show
        self.deadline = time.monotonic() + budget
        self.points: list[Point] = []
        self.broken: dict[Candidate, str] = {}
        self.precisions: dict[Candidate, str] = {}
        self.candidates: list[Candidate] = []
        self.final: dict[Candidate, list[dict[int, LoadResult]]] = {}
        self.steady: dict[Candidate, search.Arrivals] = {}
        self.best: tuple[Score, Candidate] | None = None
        self.scores: dict[Candidate, Score] = {}
        self.memory: dict[Candidate, int] = {}
        self.starts: list[float] = []
        self.shortest = search.SHORTEST
        self.timeout = max(10.0, 2 * target)

    def run(self) -> Verdict:
        """Search, and decide.

        Raises:
            BundleError: the current settings cannot be served, or no candidate meets the target.
        """
        field = self.field()
        self.finals(search.halve(field, self.judge, lambda leader: neighbours(self.candidates, leader)))
        verdict = search.decide(self.final, self.steady, self.current, self.target)
        if not verdict.scores[verdict.best].throughput:
            message = f"No tested settings meet the p99 target of {1000 * self.target:g} ms. {self.nearest()}"
            raise BundleError(message, "\n".join(self.left_out()))
        return verdict

    def left_out(self) -> list[str]:
        """Return a line about each candidate that could not be served."""
        return [f"could not be served: {candidate}: {why}" for candidate, why in self.broken.items()]

    def nearest(self) -> str:
        """Describe the measurement that came closest to the target."""
        whole = [point for point in self.points if point.load.answered and not point.load.failed]
        if not whole:
            return "None of them answered without failures."
        point = min(whole, key=lambda point: point.load.p99)
        load = point.load
        closest = (
            f"Closest: {1000 * load.p99:.1f} ms at {load.throughput:.1f} answers/s "
            f"and {point.concurrency} clients, with {point.candidate}."
        )
        if load.p99 > self.target or point.stage == FINAL or point.candidate not in self.final:
            return closest
        return f"{closest} It met the target early on but not in the final; the machine may have been busy."

    def field(self) -> list[Candidate]:
        """Measure the current settings, and return the candidates of the first round.

        The current settings show how long a start and a request take on this machine, and how long an answer is.
        """
        self.report(f"round 1, current settings: {self.current.short()}")
        with self.trial_server.started(self.current) as service:
            self.record_start(service)
            alone = service.load(1, search.SHORTEST, timeout=self.timeout)
            self.shortest = search.shortest(alone.p50, len(self.trial_server.inputs))
            self.climb(service, "round 1", search.COARSE, self.shortest)
        limit = largest_batch(int(self.trial_server.server.settings["max_response_size"]), service.answer_bytes)
        delays = self.delays(alone.p50)
        self.candidates = space(cores(), self.precisions_wanted, limit, search.LARGEST_LOAD, delays, on_gpu())
        left = self.deadline - time.monotonic()
        count = search.affordable(left, self.start_seconds(), self.shortest + RUNG_OVERHEAD)
        return spread(self.candidates, self.current, count)

    def delays(self, lone: float) -> list[int]:
        """Return the delays to try, in ms.

        Args:
            lone: how long a lone request takes with the current settings, in seconds.
        """
        if not self.waits:
            return [self.current.delay]
        waited = self.current.delay / 1000 if self.current.batch_size > 1 else 0
        return delays_up_to(min(self.target / 2, lone - waited))  # waiting at most doubles the time of a lone request

    def judge(self, field: Sequence[Candidate], number: int, rounds_left: int) -> dict[Candidate, Score]:
        """Measure each candidate of a round, in its share of the remaining time.

        Args:
            field: the candidates.
            number: of the round, from 1.
            rounds_left: the number of rounds that are left, this one and the final included.

        Returns:
            the scores of the candidates that were measured.
        """
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
            enough = number > 1 or len(scores) >= search.FINALISTS  # compare at least these, however short the time
            if enough and time.monotonic() > until:
                break
            stage = f"round {number}"
            self.report(f"{stage}, {place}/{len(field)}: {candidate.short()}")
            with self.skip_if_broken(candidate), self.trial_server.started(candidate) as service:
                self.record_start(service)
                scores[candidate] = self.climb(service, stage, self.rungs(candidate), seconds)
        return scores

    def finals(self, finalists: Sequence[Candidate]) -> None:
        """Measure the finalists and the current settings in turns, so that other load on the machine affects all."""
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
            served: dict[Candidate, Service] = {}
            for entrant in entrants if together else []:
                self.report(f"final, start: {entrant.short()}")
                with self.skip_if_broken(entrant):
                    served[entrant] = stack.enter_context(self.trial_server.started(entrant))
            for turn in range(search.REPEATS):
                for entrant in list(self.final):
                    self.report(f"final {turn + 1}/{search.REPEATS}: {entrant.short()}")
                    opened = nullcontext(served[entrant]) if together else self.trial_server.started(entrant)
                    with self.skip_if_broken(entrant), opened as service:
                        self.final[entrant].append(self.turn(service, seconds))
                        if turn == search.REPEATS - 1:
                            self.steady |= self.random_arrivals(service, seconds)

    def turn(self, service: Service, seconds: float) -> dict[int, LoadResult]:
        """Measure a finalist once, by concurrency.

        Each turn climbs by itself, so that a disturbed turn does not decide which concurrencies the others measure. It
        then measures the concurrencies of the earlier turns, too.
        """
        candidate = service.candidate

        def measure(concurrency: int) -> LoadResult:
            return self.measure(service, FINAL, concurrency, seconds)

        loads = search.climb(measure, self.rungs(candidate), self.target)
        missing = set().union(*self.final[candidate]) - set(loads)
        return loads | {concurrency: measure(concurrency) for concurrency in sorted(missing)}

    def random_arrivals(self, service: Service, seconds: float) -> dict[Candidate, search.Arrivals]:
        """Measure a finalist with requests at random times; return nothing for one that missed the target."""
        long_enough = max(seconds, search.LEAST_ARRIVALS)

        def measure(rate: float) -> LoadResult:
            self.report(f"final, {rate:.0f}/s at random times: {service.candidate.short()}")
            return service.random_arrivals(rate, long_enough, self.timeout)

        loads = search.medians(self.final[service.candidate])
        found = search.at_random_times(measure, loads, self.target)
        return {service.candidate: found} if found else {}

    def rungs(self, candidate: Candidate) -> Sequence[int]:
        """Return coarse rungs for a new candidate, and fine rungs near its best for one that was measured."""
        known = self.scores.get(candidate)
        return search.rising(known.concurrency) if known else search.COARSE

    def climb(self, service: Service, stage: str, steps: Sequence[int], seconds: float) -> Score:
        """Climb once, and record the score."""
        loads = search.climb(lambda step: self.measure(service, stage, step, seconds), steps, self.target)
        score = self.scores[service.candidate] = search.score(loads, self.target)
        if self.best is None or score > self.best[0]:
            self.best = score, service.candidate
        return score

    def measure(self, service: Service, stage: str, concurrency: int, seconds: float) -> LoadResult:
        """Measure once, and record the point."""
        load = service.load(concurrency, seconds, timeout=self.timeout)
        self.points.append(Point(service.candidate, stage, concurrency, load))
        return load

    def record_start(self, service: Service) -> None:
        """Record what the start of a candidate showed."""
        self.starts.append(service.start_seconds)
        self.memory[service.candidate] = service.memory
        self.precisions[service.candidate] = service.precision

    @contextmanager
    def skip_if_broken(self, candidate: Candidate) -> Iterator[None]:
        """Drop a candidate that cannot be served.

        Raises:
            BundleError: the server ended, or the current settings cannot be served: the search cannot go on.
        """
        try:
            yield
        except (BundleError, requests.RequestException) as error:
            if not self.trial_server.lives():
                raise BundleError(f"TorchServe ended while it served {candidate}.", str(error)) from error
            if candidate == self.current:
                raise
            self.broken[candidate] = str(error)
            self.final.pop(candidate, None)

    def start_seconds(self) -> float:
        """Return the mean time of a start so far. Removing a candidate takes no time worth counting."""
        return sum(self.starts) / len(self.starts)

    def report(self, step: str) -> None:
        """Show the current step, and the best score so far."""
        self.show(step, self.best[0] if self.best else None)
