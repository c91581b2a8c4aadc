"""Run TorchServe in the foreground, for containers and process managers: watch, measure and drain it."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import requests

from bundle import mar
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.server.client import Client
from bundle.server.drain import wait_until_idle
from bundle.server.fetch import sha256
from bundle.server.process import Running, Server
from bundle.server.readiness import last_words, scale_version
from bundle.server.rollout import copy
from bundle.signing import check, key_of
from bundle.supervisor.exporter import Exporter
from bundle.supervisor.gate import LOGGED_BEAT, Gate
from bundle.supervisor.health import History, observe
from bundle.supervisor.log_follower import Follower, count_failures
from bundle.supervisor.state import State, merge, missing, restore
from bundle.versions import is_older

TICK_SECONDS = 0.5
OBSERVE_SECONDS = 5
STALE_SECONDS = 30  # not ready if the management API has not answered for longer
ACCESS_LOG = "access_log.log"
LOGS = ("ts_log.log", "model_log.log", ACCESS_LOG)


@dataclass(frozen=True)
class Options:
    """How a server is supervised.

    Attributes:
        host, port: address of /metrics, /ready and /live.
        state: the file that keeps what the management API changed; None to keep nothing.
        gate: a folder in which files tell a proxy whether the server takes requests; see `Gate`.
        replicas: number of servers that serve the same behind one proxy; None if it is not known.
        start_seconds: to wait at most until every model is READY.
        patience_seconds: how long workers may be missing, or the management API unavailable. TorchServe itself gives up
            on a worker after 300 s.
        drain_seconds: to wait at most for requests in flight before the end.
        workers: number of workers of each model that does not get those of its archive. What the management API has
            changed since is restored after them, until a start has another number.
    """

    host: str
    port: int
    state: Path | None
    gate: Path | None
    replicas: int | None
    start_seconds: float
    patience_seconds: float
    drain_seconds: float
    workers: Mapping[str, int]


class Supervisor:
    """Run one server until SIGTERM or SIGINT, or until it must be replaced."""

    def __init__(self, server: Server, options: Options, report: Callable[[str], object]):
        self.server, self.options, self.report = server, options, report
        self.history = History()
        self.gate = Gate(options.gate)
        self.failures: Counter[tuple[str, str, str]] = Counter()
        self.followers = [Follower(server.logs / name) for name in LOGS]
        self.observed = 0.0
        self.serving = False
        self.stopping = False
        self.ended = threading.Event()
        self.archive_versions: dict[str, str] = {}
        self.saved = State()  # by an earlier run
        self.restored: State | None = None  # what the restore came to
        self.written: State | None = None

    def run(self, folders: list[ModelFolder], start: Callable[[Server, list[ModelFolder], float], Running]) -> None:
        """Start the server, watch it, and return after a requested stop, when it is drained.

        Args:
            start: starts the server and returns when its models serve; if it fails, it leaves nothing running.

        Raises:
            BundleError: the server did not start, ended, or has lacked workers for too long. It is stopped, and its
                container should be restarted.
        """
        self.gate.close()
        exporter = Exporter(
            self.history, self.failures, self.unready, lambda: self.stopping, replicas=self.options.replicas
        )
        endpoint = exporter.serve(self.options.host, self.options.port)
        relay = threading.Thread(target=self.relay_logs, name="logs")
        relay.start()
        try:
            if self.options.state:
                self.written = State.read(self.options.state)  # other replicas write it, too: only what changes
                self.saved = self.written or State()
            running = start(self.server, folders, self.options.start_seconds)
            try:
                self.archive_versions = archive_versions(self.server.store, folders)
                self.saved = self.saved.without_outdated(self.options.workers, self.archive_versions)
                self.set_workers(running.client())
                restore(self.server, running.client(), self.saved, self.options.start_seconds, self.report)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, self.ask_to_stop)
                self.watch(running)
                self.drain(running)
            finally:
                try:
                    self.gate.close()
                finally:
                    self.server.stop()
        finally:
            self.ended.set()
            relay.join()
            endpoint.shutdown()

    def set_workers(self, client: Client) -> None:
        """Give models the numbers of workers that the options have, and wait until they are READY.

        Raises:
            BundleError: they do not become READY.
        """
        for name, count in self.options.workers.items():
            self.report(f"workers of {name}: {count}")
            version, seconds = self.archive_versions[name], self.options.start_seconds
            scale_version(client, self.server.logs, name, version, (count, count), seconds)

    def ask_to_stop(self, *_: object) -> None:
        self.stopping = True  # a plain flag, because a signal may interrupt code that holds an Event's lock

    def watch(self, running: Running) -> None:
        """Watch the server until it is to stop.

        Raises:
            BundleError: the server ended, does not answer, or has lacked workers for too long.
        """
        self.observed = time.monotonic()
        self.look(running)
        self.gate.open()
        if self.beats():
            beat = (running.client().management, self.ended)
            threading.Thread(target=self.gate.beat, args=beat, daemon=True, name="beat").start()
        self.serving = True
        self.report("serving")
        while not self.stopping:
            time.sleep(TICK_SECONDS)
            if running.process() is None:
                raise BundleError("TorchServe ended.", last_words(self.server))
            if time.monotonic() - self.observed > OBSERVE_SECONDS:
                self.look(running)
            self.check_workers()

    def beats(self) -> bool:
        """Return whether the gate shows the proxy that the server answers: if there is another one to choose."""
        return self.options.gate is not None and (self.options.replicas or 1) > 1

    def look(self, running: Running) -> None:
        """Observe the server, and save its state."""
        try:
            versions = observe(running.client(), self.server.settings.url("metrics_address"))
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
        """Write the state file, if something has changed."""
        if self.options.state is None:
            return
        now = replace(self.history.state(self.archive_versions, self.saved), given=dict(self.options.workers))
        self.restored = self.restored or now  # the first observation after the restore
        kept = merge(self.saved, self.restored, now, self.server.store)
        self.history.not_restored = missing(kept, now)
        if kept != self.written:
            try:
                kept.write(self.options.state)
            except OSError as exc:  # a full disk must not end the server
                self.report(f"the state could not be saved: {exc}")
            self.written = kept

    def check_workers(self) -> None:
        """Raise a BundleError if workers are missing, or the management API unavailable, for too long."""
        patience = self.options.patience_seconds
        unanswered = max(patience, 2 * OBSERVE_SECONDS)  # it is observed no more often
        if time.monotonic() - self.observed > unanswered:
            raise BundleError(f"The management API has not answered for {unanswered:.0f} s.", last_words(self.server))
        for (name, version), since in self.history.degraded_since.items():
            if time.monotonic() - since > patience:
                raise BundleError(f"{name} {version} has lacked workers for {patience:.0f} s.", last_words(self.server))

    def unready(self) -> str:
        """Return why the server should get no requests; "" if it is ready."""
        if self.stopping:
            return "draining"
        if not self.serving:
            return "starting"
        if time.monotonic() - self.observed > STALE_SECONDS:
            return "the management API does not answer"
        return "; ".join(f"{name} {version} lacks workers" for name, version in self.history.degraded_since)

    def drain(self, running: Running) -> None:
        """Close the gate, and wait until no requests are in flight."""
        self.report("draining")
        try:
            self.gate.close()
        except BundleError as exc:  # requests in flight get their answers nevertheless
            self.report(str(exc))
        self.look(running)
        keys = [version.key for version in self.history.latest]
        try:
            ports = self.server.settings.inference_ports()
            wait_until_idle(running.client(), keys, ports, self.options.drain_seconds)
            self.report("drained")
        except BundleError as exc:
            self.report(f"not drained: {exc}")

    def relay_logs(self) -> None:
        """Copy the log files to standard output until the run has ended, and count failed requests."""
        last = False
        while not last:
            last = self.ended.wait(TICK_SECONDS)
            for follower in self.followers:
                lines = follower.lines()
                if follower.file.name == ACCESS_LOG:
                    names = {version.registered.name for version in self.history.latest}
                    count_failures(lines, names, self.failures)
                    if self.beats():  # a beat that is answered with an error would be logged every second
                        lines = [line for line in lines if not LOGGED_BEAT.match(line)]
                for line in lines:
                    print(line, flush=True)


def archive_versions(store: Path, folders: list[ModelFolder]) -> dict[str, str]:
    """Return the version of each model's archive."""
    return {folder.name: mar.version(store / f"{folder.name}.mar") for folder in folders}


def install_archives(source: Path, store: Path, served: Collection[str], report: Callable[[str], object]) -> None:
    """Copy an image's archives into the store, each once, so that a restart does not undo a rollout.

    A new image's archive replaces the store's, unless its version is lower. Words and hashes have no order, so that an
    archive with such a version always replaces the other one.

    Args:
        served: the models whose archives are checked first, so that a damaged one does not replace the store's. The
            others may be of other servers.

    Raises:
        BundleError: an archive is invalid, was changed since it was built or signed, or cannot be copied: the disk is
            full, say.
    """
    trusted = key_of("TRUSTED_KEY")
    for archive in sorted(source.glob("*.mar")):
        digest = sha256(archive)
        record = store / f".{archive.stem}.seeded"
        if record.is_file() and record.read_text() == digest:
            continue
        present = store / archive.name
        if present.is_file() and is_older(mar.version(archive), mar.version(present)):
            report(f"{archive.name} of this image is older than the store's, and was not installed")
            continue
        if archive.stem in served:
            check(archive, trusted)
        try:
            store.mkdir(parents=True, exist_ok=True)
            copy(archive, present)
            record.write_text(digest)
        except OSError as exc:
            raise BundleError(f"{archive} cannot be copied into {store}: {exc.strerror or exc}.") from exc
        report(f"{archive.name} of this image was installed in the store")
