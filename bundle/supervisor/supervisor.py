"""TorchServe in the foreground, for containers and process managers: watched, measured, drained before it ends."""

import hashlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from bundle import mar
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.server.drain import wait_until_idle
from bundle.server.process import Running, Server
from bundle.server.readiness import last_words
from bundle.server.rollout import copy
from bundle.supervisor.exporter import Exporter
from bundle.supervisor.health import History, observe
from bundle.supervisor.log_follower import Follower, count_failures
from bundle.supervisor.state import State, restore

TICK_SECONDS = 0.5
OBSERVE_SECONDS = 5
STALE_SECONDS = 30  # the management API does not answer for so long: not ready
LOGS = ("ts_log.log", "model_log.log", "access_log.log")


@dataclass(frozen=True)
class Options:
    """How a server is supervised.

    Attributes:
        host, port: where /metrics and /ready are.
        state: the file that keeps what the management API changed; None to forget.
        gate: a folder in which the file `closed` tells a proxy that the server takes nothing.
        start_seconds: to wait at most until every model is READY.
        patience_seconds: for how long a model may lack workers that it had, or TorchServe an answer. TorchServe itself
            gives up on a worker after 300 s, and its requests then wait for ever.
        drain_seconds: to wait at most for what is in flight before the end.
    """

    host: str
    port: int
    state: Path | None
    gate: Path | None
    start_seconds: float
    patience_seconds: float
    drain_seconds: float


class Supervisor:
    """Runs one server until it is told to stop (SIGTERM, SIGINT) or must be replaced."""

    def __init__(self, server: Server, options: Options, report: Callable[[str], object]):
        self.server, self.options, self.report = server, options, report
        self.history = History()
        self.failures: Counter[tuple[str, str, str]] = Counter()
        self.followers = [Follower(server.logs / name) for name in LOGS]
        self.observed = 0.0
        self.serving = False
        self.stopping = False
        self.ended = threading.Event()
        self.offered: dict[str, str] = {}
        self.restored: State | None = None
        self.saved: State | None = None

    def run(self, folders: list[ModelFolder], start: Callable[[Server, list[ModelFolder], float], Running]) -> None:
        """Returns after a drained stop that was asked for.

        Args:
            start: starts the server and returns when its models serve; whatever goes wrong, it leaves nothing running.

        Raises:
            BundleError: the server did not start, ended, or lacks workers for too long: it is stopped, and its
                container should be started anew.
        """
        self.close_gate()
        exporter = Exporter(self.history, self.failures, self.unready, lambda: self.stopping)
        endpoint = exporter.serve(self.options.host, self.options.port)
        relay = threading.Thread(target=self.relay_logs, name="logs")
        relay.start()
        try:
            self.restored = State.read(self.options.state) if self.options.state else None
            running = start(self.server, folders, self.options.start_seconds)
            try:
                self.offered = offered(self.server.store, folders)
                if self.restored:
                    restore(self.server, running.client(), self.restored, self.options.start_seconds, self.report)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, self.ask_to_stop)
                self.watch(running)
                self.drain(running)
            finally:
                self.close_gate()
                self.server.stop()
        finally:
            self.ended.set()
            relay.join()
            endpoint.shutdown()

    def ask_to_stop(self, *_: object) -> None:
        self.stopping = True  # a plain flag: an Event's lock may be held by what the signal interrupts

    def watch(self, running: Running) -> None:
        """Returns when it is time to stop.

        Raises:
            BundleError: the server ended, does not answer, or has lacked workers for too long.
        """
        self.observed = time.monotonic()
        self.look(running)
        self.open_gate()
        self.serving = True
        self.report("serving")
        while not self.stopping:
            time.sleep(TICK_SECONDS)
            if running.process() is None:
                raise BundleError("TorchServe ended.", last_words(self.server))
            if time.monotonic() - self.observed > OBSERVE_SECONDS:
                self.look(running)
            self.check_strength()

    def look(self, running: Running) -> None:
        try:
            versions = observe(running.client())
        except requests.RequestException as exc:
            self.report(f"the management API does not answer: {exc}")
            return
        self.observed = time.monotonic()
        self.history.add(versions, self.observed)
        for version in versions:
            for status in ("500", "503"):
                self.failures[version.key[0], "default", status] += 0  # a rate needs a series that begins at 0
        self.save()

    def save(self) -> None:
        if self.options.state is None:
            return
        state = self.history.state(self.offered, self.restored)
        if state != self.saved:
            try:
                state.write(self.options.state)
            except OSError as exc:  # a full disk ends no server
                self.report(f"the state is not kept: {exc}")
            self.saved = state

    def check_strength(self) -> None:
        patience = self.options.patience_seconds
        unanswered = max(patience, 2 * OBSERVE_SECONDS)  # it is asked no more often than that
        if time.monotonic() - self.observed > unanswered:
            raise BundleError(f"The management API has not answered for {unanswered:.0f} s.", last_words(self.server))
        for (name, version), since in self.history.weak_since.items():
            if time.monotonic() - since > patience:
                raise BundleError(f"{name} {version} has lacked workers for {patience:.0f} s.", last_words(self.server))

    def unready(self) -> str:
        """Why the server should get no requests; "" where it should."""
        if self.stopping:
            return "draining"
        if not self.serving:
            return "starting"
        if time.monotonic() - self.observed > STALE_SECONDS:
            return "the management API does not answer"
        return "; ".join(f"{name} {version} lacks workers" for name, version in self.history.weak_since)

    def drain(self, running: Running) -> None:
        """Takes nothing more, and waits for what was taken."""
        self.report("draining")
        self.close_gate()
        self.look(running)
        keys = [version.key for version in self.history.latest]
        try:
            ports = self.server.settings.inference_ports()
            wait_until_idle(running.client(), keys, ports, self.options.drain_seconds)
            self.report("drained")
        except BundleError as exc:
            self.report(f"not drained: {exc}")

    def open_gate(self) -> None:
        if self.options.gate:
            (self.options.gate / "closed").unlink(missing_ok=True)

    def close_gate(self) -> None:
        if self.options.gate:
            (self.options.gate / "closed").touch()

    def relay_logs(self) -> None:
        """Until the run has ended."""
        last = False
        while not last:
            last = self.ended.wait(TICK_SECONDS)
            for follower in self.followers:
                lines = follower.lines()
                if follower.file.name == "access_log.log":
                    names = {version.registered.name for version in self.history.latest}
                    count_failures(lines, names, self.failures)
                for line in lines:
                    print(line, flush=True)


def offered(store: Path, folders: list[ModelFolder]) -> dict[str, str]:
    """The version of each folder's archive."""
    return {folder.name: mar.version(store / f"{folder.name}.mar") for folder in folders}


def seed(source: Path, store: Path, report: Callable[[str], object]) -> None:
    """Copies an image's archives into the store, each once: what was rolled out there since is not undone by a
    restart. A new image's archive does replace it, unless it is the older version."""
    for archive in sorted(source.glob("*.mar")):
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        record = store / f".{archive.stem}.seeded"
        if record.is_file() and record.read_text() == digest:
            continue
        present = store / archive.name
        if present.is_file() and number(mar.version(present)) > number(mar.version(archive)):
            report(f"{archive.name} of this image is older than the store's, and left out")
            continue
        copy(archive, present)
        record.write_text(digest)
        report(f"{archive.name} of this image is put into the store")


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
