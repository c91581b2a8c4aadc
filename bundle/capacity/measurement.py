"""Measure one replica: closed loops, from which its queue is known, and an open loop, which checks it."""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bundle.capacity.figures import Figures, Identity, Point
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.load.generator import LoadResult
from bundle.paths import relative
from bundle.server.process import Server
from bundle.tuning.search import SHORTEST, medians, shortest
from bundle.tuning.space import Candidate
from bundle.tuning.trial_server import Input, Service, TrialServer

ROUNDS = 3  # of the closed loops; the medians count, so that other work on the machine affects all loads alike
LEAST_SECONDS = 1.5  # of a closed loop
CHECK_SECONDS = 8.0  # of the open loop
CHECKED = 0.7  # share of the capacity at which it runs
TIMEOUT = 10.0  # seconds until an unanswered request has failed
WARM_UP_SECONDS, WARM_UPS = 2.0, 8  # Java compiles what it runs often: its first thousands of requests are slow
STEADY = 0.05  # a warm-up that gains less is the last

Show = Callable[[str, float], None]


def measure(
    folder: ModelFolder,
    archive: Path,
    inputs: list[Input],
    show: Show,
    run_dir: Path | None = None,
    anyway: bool = False,
) -> Figures:
    """Measure one replica with the model's own settings, on a TorchServe of its own.

    Args:
        inputs: what to send; several take turns.
        show: receives the current step, and the share of the work that is done.
        run_dir: the run folder of that server; by default, a folder in that of `make serve`.
        anyway: whether figures count although other processes used the machine.

    Raises:
        BundleError: the model cannot be served, requests failed, or other processes used the machine.
    """
    now = Identity.of(folder, archive, inputs)
    with tempfile.TemporaryDirectory(prefix="capacity-") as store:
        trial = TrialServer(folder, archive, inputs, run_dir or Server().run_dir / "capacity", Path(store))
        with trial.server.lock(), trial, trial.started(now.settings) as service:
            before = seconds_of_others(trial.running.pid), time.monotonic()
            figures = checked(service, measured(service, now, show), show)
            busy = seconds_of_others(trial.running.pid) - before[0]
            share = busy / (time.monotonic() - before[1]) / len(os.sched_getaffinity(0))
    # the clocks are coarse, so that the difference may be a little below 0
    figures = replace(figures, others=round(max(0.0, share), 3))
    if figures.disturbed and not anyway:
        raise BundleError(
            f"Other processes used {share:.0%} of the CPU meanwhile, so the figures are too low, and are not kept. End "
            "them, or measure nevertheless: --anyway, or ANYWAY=1 of make"
        )
    return figures


def measured(service: Service, now: Identity, show: Show) -> Figures:
    """Measure a replica that is served already, without a check; see `measure`."""
    numbers = clients(now.settings)
    full = numbers[-1]
    show("warm-up", 0.0)
    warm_up(service, full)
    alone = whole(service.load(1, SHORTEST, TIMEOUT), service)
    seconds = max(LEAST_SECONDS, shortest(alone.p50, len(service.inputs)))
    timeout = max(TIMEOUT, 100 * alone.p50)
    rounds: list[dict[int, LoadResult]] = []
    load_cores = 0.0
    for turn in range(ROUNDS):
        rounds.append({})
        for place, number in enumerate(numbers):
            show(f"round {turn + 1} of {ROUNDS}, {number} clients", (turn + place / len(numbers)) / (ROUNDS + 1))
            spent, began = load_seconds(), time.monotonic()
            rounds[-1][number] = service.load(number, seconds, timeout)
            if number == full:
                load_cores = max(load_cores, (load_seconds() - spent) / (time.monotonic() - began))
    found = {number: whole(load, service) for number, load in medians(rounds).items()}
    return Figures(
        of=now,
        source="measured by bundle capacity",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        request_bytes=max(len(each.body) for each in service.inputs),
        answer_bytes=service.answer_bytes,
        memory=service.memory,
        load_cores=round(load_cores, 3),
        points=tuple(Point.of(each, load) for each, load in found.items()),
        check=None,
        others=None,
    )


def checked(service: Service, figures: Figures, show: Show) -> Figures:
    """Return the figures with a check: requests at random times, from which the model of the queue is not made."""
    rate = CHECKED * figures.replica.capacity
    show(f"check: {rate:.0f} requests/s at random times", ROUNDS / (ROUNDS + 1))
    alone = figures.points[0].p50
    lasts, timeout = max(CHECK_SECONDS, shortest(alone, len(service.inputs))), max(TIMEOUT, 100 * alone)
    load = whole(service.random_arrivals(rate, lasts, timeout), service)
    return replace(figures, check=replace(Point.of(0, load), throughput=rate))


def whole(load: LoadResult, service: Service) -> LoadResult:
    """Return the load, if the service answered all of it.

    Raises:
        BundleError: requests failed.
    """
    if load.failed or not load.answered:
        raise BundleError(
            f"{load.failed} requests failed while the model was measured: it answered with an error, or too late "
            f"({TIMEOUT:g} s or more). See access_log.log (each answer with an error) and model_log.log (the workers' "
            f"output), which are kept until the next measurement, in {relative(service.logs)}"
        )
    return load


def clients(settings: Candidate) -> list[int]:
    """Return the numbers of clients to measure: one; enough for batches of one, of two more sizes, and for full ones.

    Full batches need more clients than they take, because some clients wait without occupying a worker.
    """
    busy, largest = settings.workers + 1, settings.batch_size
    return sorted(
        {1, busy, round(busy * largest ** (1 / 3)), round(busy * largest ** (2 / 3)), busy * max(4, 2 * largest)}
    )


def warm_up(service: Service, number: int) -> None:
    """Load a replica until it gets no faster."""
    best = 0.0
    for _ in range(WARM_UPS):
        throughput = service.load(number, WARM_UP_SECONDS, TIMEOUT).throughput
        if throughput <= (1 + STEADY) * best:
            return
        best = throughput


def seconds_of_others(server: int) -> float:
    """Return the processor time that the usable cores have spent on other things than this command and its server.

    Args:
        server: the server's process id.
    """
    cores = psutil.cpu_times(percpu=True)
    used = 0.0
    for times in (cores[number] for number in os.sched_getaffinity(0)):
        used += sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    own = load_seconds()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(server)
        for process in (root, *root.children(recursive=True), psutil.Process()):
            with suppress(psutil.NoSuchProcess):  # it has ended: its parent has its time
                spent = process.cpu_times()
                own += spent.user + spent.system
                own += spent.children_user + spent.children_system if process.pid != os.getpid() else 0.0
    return used - own


def load_seconds() -> float:
    """Return the processor time of the child processes that have ended: nearly all of it is the load generator's."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
