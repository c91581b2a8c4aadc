"""A TorchServe for measuring: candidates are served by it, one after the other, and loaded with wrk."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean

import psutil
import requests
import yaml

from bundle import mar
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.load.generator import Load, closed_loop, open_loop
from bundle.samples import first, headers
from bundle.server.client import Client
from bundle.server.http import SECONDS, session
from bundle.server.process import Running, Server
from bundle.server.readiness import last_words, start_version
from bundle.server.rollout import withdraw
from bundle.server.settings import Settings
from bundle.signing import UNSEALED, key_of, seal
from bundle.tuning.search import LARGEST_LOAD
from bundle.tuning.space import Candidate
from bundle.tuning.yaml_edit import Keys, put

START_SECONDS = 300  # for the workers of a candidate
WARM_UP_SECONDS = 1.0


def settings_of(candidate: Candidate) -> dict[Keys, int | str]:
    """The candidate, as model-config.yaml has it."""
    return {
        ("minWorkers",): candidate.workers,
        ("maxWorkers",): candidate.workers,
        ("batchSize",): candidate.batch_size,
        ("maxBatchDelay",): candidate.delay,
        ("handler", "threads"): candidate.threads,
        ("handler", "precision"): candidate.precision,
    }


@dataclass(frozen=True)
class Input:
    """A file to send."""

    file: Path
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return headers(self.file)


@dataclass(frozen=True)
class Service:
    """A candidate that is served.

    Attributes:
        url: of its predictions.
        start_seconds: how long it took until it served.
        memory: bytes resident of its workers.
        precision: that the workers compute in; "" where the handler does not tell.
        answer_bytes: the length of its longest answer.
    """

    candidate: Candidate
    url: str
    inputs: list[Input]
    start_seconds: float
    memory: int
    precision: str
    answer_bytes: int

    def load(self, concurrency: int, seconds: float, timeout: float) -> Load:
        """A closed loop; with several inputs, one for each, of its share of the seconds.

        Raises:
            BundleError: nobody answers.
        """
        share = seconds / len(self.inputs)
        loads = [closed_loop(self.url, i.body, i.headers, concurrency, share, timeout) for i in self.inputs]
        return joined(loads)

    def random_arrivals(self, rate: float, seconds: float, timeout: float) -> Load:
        """An open loop: requests come at random times, whether or not the server keeps up.

        Raises:
            BundleError: nobody answers.
        """
        share = seconds / len(self.inputs)
        loads = [open_loop(self.url, i.body, i.headers, rate, share, LARGEST_LOAD, timeout) for i in self.inputs]
        return joined(loads)


def joined(loads: list[Load]) -> Load:
    """The loads of several inputs, as of one that asks for each of them equally often. The percentiles are those of the
    slowest input: what all of them stay within.
    """
    return Load(
        seconds=sum(load.seconds for load in loads),
        answered=sum(load.answered for load in loads),
        failed=sum(load.failed for load in loads),
        throughput=harmonic_mean([load.throughput for load in loads]),
        **{name: max(getattr(load, name) for load in loads) for name in ("p50", "p95", "p99", "longest")},
    )


class Bench:
    """Starts TorchServe when it is entered, on free ports and without models, and stops it when it is left.

    Args:
        archive: of the model.
        inputs: to send, in turns.
        run_dir: for the server's record and logs.
        store: an empty folder for the candidates' archives.
    """

    def __init__(self, folder: ModelFolder, archive: Path, inputs: list[Input], run_dir: Path, store: Path):
        self.folder, self.archive, self.inputs, self.store = folder, archive, inputs, store
        self.version = mar.version(archive)
        self.server = Server(run_dir, Settings.isolated(store, load_models=""))
        self.running: Running | None = None
        self.count = 0

    def __enter__(self) -> "Bench":
        self.server.stop()  # what a killed predecessor may have left
        self.running = self.server.start([])
        try:
            self.wait_for_management()
        except BaseException:
            self.server.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    @property
    def client(self) -> Client:
        return self.running.client()

    def wait_for_management(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.client.models()
                return
            except requests.RequestException:
                if not self.lives() or time.monotonic() > deadline:
                    raise BundleError("TorchServe did not start.", last_words(self.server)) from None
            time.sleep(0.1)

    def lives(self) -> bool:
        return self.running.process() is not None

    @contextmanager
    def started(self, candidate: Candidate) -> Iterator[Service]:
        """Serves a candidate, warmed up, until the block ends.

        Raises:
            BundleError: its workers do not come up, or do not answer an input as they must.
        """
        self.count += 1
        name = f"tune-{self.count}"
        file = self.store / f"{name}.mar"
        variant(self.archive, file, candidate, self.kept_precision(candidate))
        start = time.monotonic()
        try:
            workers = candidate.workers, candidate.workers
            start_version(self.client, self.server.logs, file.name, name, self.version, workers, START_SECONDS)
            url = f"{self.running.inference}/predictions/{name}"
            answer_bytes = max(self.check(url, each) for each in self.inputs)
            load = min(LARGEST_LOAD, 2 * candidate.workers * candidate.batch_size)
            closed_loop(url, self.inputs[0].body, self.inputs[0].headers, load, WARM_UP_SECONDS)
            seconds = time.monotonic() - start
            described = self.client.describe(name)
            memory, precision = resident(described), self.precision(name)
            yield Service(candidate, url, self.inputs, seconds, memory, precision, answer_bytes)
        finally:
            file.unlink(missing_ok=True)
            if self.lives():
                with suppress(
                    BundleError, requests.RequestException
                ):  # the server ends with the search; the findings count
                    withdraw(self.client, name, self.version)

    def kept_precision(self, candidate: Candidate) -> str | list[str]:
        """The candidate's; where the folder has the same, the archive's, which may have settled for fewer."""
        own = precision_name(precision_of(self.folder.config))
        return precision_of(mar.config(self.archive)) if candidate.precision == own else candidate.precision

    def check(self, url: str, sent: Input) -> int:
        """Sends an input once, and returns the length of its answer.

        Raises:
            BundleError: the answer is an error, or to the folder's sample another than the folder expects.
        """
        answer = session.post(url, data=sent.body, headers=sent.headers, timeout=SECONDS)
        if answer.status_code != 200:
            raise BundleError(f"{self.folder.name} answers {sent.file} with {answer.status_code}.", answer.text)
        expected = self.folder.bundle.expect
        if sent.file == self.folder.sample_file and expected is not None:
            best = first(answer.json())
            if best is None or best.label != expected:
                came = repr(best.label) if best else "an answer that is not a ranking"
                raise BundleError(f"{self.folder.name} answers {sent.file} with {came}, not with {expected!r}.")
        return len(answer.content)

    def precision(self, name: str) -> str:
        """What `auto` came to."""
        try:
            url = f"{self.running.management}/models/{name}"
            [described] = session.get(url, params={"customized": "true"}, timeout=SECONDS).json()
            told = described["customizedMetadata"]
            return str((json.loads(told) if isinstance(told, str) else told)["precision"])
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return ""


def variant(archive: Path, target: Path, candidate: Candidate, precision: str | list[str]) -> None:
    """A copy of an archive with the candidate's settings, which stand above those of the registration, in the given
    precision. It keeps no answers: the same few inputs come again and again.
    """
    values = mar.config(archive)
    for keys, value in (settings_of(candidate) | {("handler", "precision"): precision}).items():
        put(values, keys, value)
    if "cache_entries" in values["handler"]:
        put(values, ("handler", "cache_entries"), 0)
    config = {mar.manifest(archive)["configFile"]: yaml.safe_dump(values, sort_keys=False).encode()}
    mar.rewrite(archive, target, config | UNSEALED)
    seal(target, key_of("SIGNING_KEY"))


def precision_of(config: dict) -> str | list[str]:
    """What a model-config.yaml says: a precision, auto, or a list to choose from."""
    return (config.get("handler") or {}).get("precision", "auto")


def precision_name(precision: str | list[str]) -> str:
    return precision if isinstance(precision, str) else " or ".join(precision)


def resident(described: dict) -> int:
    """Bytes resident of a version's workers."""
    total = 0
    for worker in described["workers"]:
        try:
            total += psutil.Process(int(worker["pid"])).memory_info().rss
        except (psutil.Error, ValueError):
            pass
    return total


def largest_batch(limit: int, answer_bytes: int) -> int:
    """How many answers of this length TorchServe takes at once: a larger response ends the worker.

    Args:
        limit: max_response_size.
    """
    overhead = 1024  # of an answer's headers and the like, generously
    return max(1, math.floor(limit / (answer_bytes + overhead)))
