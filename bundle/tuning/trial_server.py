"""Serve candidates on a TorchServe for measurements, and load them with wrk."""

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
from bundle.load.generator import LoadResult, closed_loop, open_loop
from bundle.samples import first, headers
from bundle.server.client import Client
from bundle.server.http import SECONDS, session
from bundle.server.process import Server
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
    """Return the candidate's settings, by their place in model-config.yaml."""
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
    """A file to send as a request."""

    file: Path
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return headers(self.file)


@dataclass(frozen=True)
class Service:
    """A candidate that is being served.

    Attributes:
        url: of its predictions.
        inputs: what to send; several take turns.
        start_seconds: how long it took to start.
        memory: resident memory of its workers, in bytes.
        precision: the precision that the workers compute in; "" if the handler does not describe it.
        answer_bytes: length of its longest answer.
        logs: the folder of the server's logs.
    """

    candidate: Candidate
    url: str
    inputs: list[Input]
    start_seconds: float
    memory: int
    precision: str
    answer_bytes: int
    logs: Path

    def load(self, concurrency: int, seconds: float, timeout: float) -> LoadResult:
        """Load the candidate in a closed loop; several inputs share the time.

        Args:
            concurrency: number of clients.
            seconds: how long to send.
            timeout: see `closed_loop`.

        Raises:
            BundleError: wrk cannot connect.
        """
        share = seconds / len(self.inputs)
        loads = [closed_loop(self.url, i.body, i.headers, concurrency, share, timeout) for i in self.inputs]
        return joined(loads)

    def random_arrivals(self, rate: float, seconds: float, timeout: float) -> LoadResult:
        """Load the candidate in an open loop, with requests at random times; several inputs share the time.

        Args:
            rate: requests a second.
            seconds: how long to send.
            timeout: see `open_loop`.

        Raises:
            BundleError: wrk cannot connect.
        """
        share = seconds / len(self.inputs)
        loads = [open_loop(self.url, i.body, i.headers, rate, share, LARGEST_LOAD, timeout) for i in self.inputs]
        return joined(loads)


def joined(loads: list[LoadResult]) -> LoadResult:
    """Return the result of a load that sends each of several inputs equally often.

    The percentiles are those of the slowest input, so all inputs stay within them.
    """
    latencies = {name: max(getattr(load, name) for load in loads) for name in ("p50", "p95", "p99", "longest")}
    return LoadResult(
        seconds=sum(load.seconds for load in loads),
        answered=sum(load.answered for load in loads),
        failed=sum(load.failed for load in loads),
        throughput=harmonic_mean([load.throughput for load in loads]),
        **latencies,
    )


class TrialServer:
    """A TorchServe on free ports, without models, that runs inside a `with` block.

    Args:
        folder: the model's folder.
        archive: the model's archive.
        inputs: what to send; several take turns.
        run_dir: the folder of the server's record and logs.
        store: an empty folder for the candidates' archives.
    """

    def __init__(self, folder: ModelFolder, archive: Path, inputs: list[Input], run_dir: Path, store: Path):
        self.folder, self.archive, self.inputs, self.store = folder, archive, inputs, store
        self.version = mar.version(archive)
        self.server = Server(run_dir, Settings.isolated(store, load_models=""))
        self.count = 0

    def __enter__(self) -> "TrialServer":
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
        """Wait until the management API answers.

        Raises:
            BundleError: the server ended, or timed out.
        """
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
        """Return whether the server still runs."""
        return self.running.process() is not None

    @contextmanager
    def started(self, candidate: Candidate) -> Iterator[Service]:
        """Serve a candidate, warmed up, until the block ends.

        Raises:
            BundleError: its workers do not start, or an answer is an error or not the expected one.
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
            memory, precision = resident(self.client.describe(name) or {}), self.precision(name)
            yield Service(candidate, url, self.inputs, seconds, memory, precision, answer_bytes, self.server.logs)
        finally:
            file.unlink(missing_ok=True)
            if self.lives():
                # the measurements are valid even if this fails, and the server ends with the search
                with suppress(BundleError, requests.RequestException):
                    withdraw(self.client, name, self.version)

    def kept_precision(self, candidate: Candidate) -> str | list[str]:
        """Return the precision for the candidate's archive.

        It is the candidate's. For the folder's own setting it is the archive's, which has only accurate precisions.
        """
        own = precision_name(precision_of(self.folder.config))
        return precision_of(mar.config(self.archive)) if candidate.precision == own else candidate.precision

    def check(self, url: str, sent: Input) -> int:
        """Send an input once, and return the length of its answer.

        Raises:
            BundleError: the answer is an error, or the sample's answer is not the one that the folder expects.
        """
        answer = session.post(url, data=sent.body, headers=sent.headers, timeout=SECONDS)
        if answer.status_code != 200:
            raise BundleError(f"{self.folder.name} answered {sent.file} with {answer.status_code}.", answer.text)
        expected = self.folder.bundle.expect
        if sent.file == self.folder.sample_file and expected is not None:
            best = first(answer.json())
            if best is None or best.label != expected:
                came = repr(best.label) if best else "an answer that is not a ranking"
                raise BundleError(f"{self.folder.name} answered {sent.file} with {came}, not with {expected!r}.")
        return len(answer.content)

    def precision(self, name: str) -> str:
        """Return the precision that the workers compute in; "" if the handler does not describe it."""
        try:
            url = f"{self.running.management}/models/{name}"
            [described] = session.get(url, params={"customized": "true"}, timeout=SECONDS).json()
            metadata = described["customizedMetadata"]
            return str((json.loads(metadata) if isinstance(metadata, str) else metadata)["precision"])
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return ""


def variant(archive: Path, target: Path, candidate: Candidate, precision: str | list[str]) -> None:
    """Write a copy of an archive with a candidate's settings, in the given precision.

    TorchServe prefers an archive's settings to those of its registration. The copy does not cache answers, because the
    same few inputs are sent again and again.
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
    """Return the setting `precision` of a model-config.yaml: a precision, "auto", or a list to choose from."""
    return (config.get("handler") or {}).get("precision", "auto")


def precision_name(precision: str | list[str]) -> str:
    """Return the setting `precision` as one string."""
    return precision if isinstance(precision, str) else " or ".join(precision)


def resident(described: dict) -> int:
    """Return the resident memory of a version's workers, in bytes."""
    total = 0
    for worker in described.get("workers", []):
        try:
            total += psutil.Process(int(worker["pid"])).memory_info().rss
        except (psutil.Error, ValueError):
            pass
    return total


def largest_batch(limit: int, answer_bytes: int) -> int:
    """Return how many answers of this length fit in one response; a larger response ends the worker.

    Args:
        limit: TorchServe's max_response_size, in bytes.
    """
    overhead = 1024  # of an answer: headers and the like, with room to spare
    return max(1, math.floor(limit / (answer_bytes + overhead)))
