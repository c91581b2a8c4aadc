"""Wait until a server that was just started serves, or find out why it does not."""

import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import requests

from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.server.client import AlreadyRegistered, Client, WorkerCount
from bundle.server.http import Untrusted
from bundle.server.process import Running, Server
from bundle.server.tracebacks import WORKER_DIED, explain

POLL_SECONDS = 0.3
WORKER_RETRIED = "Retry worker"
WORKER_TIMED_OUT = ("Backend worker startup time out", "Backend worker did not respond in given time")
TRACE_PAUSES = 10  # at most, of POLL_SECONDS, for a traceback that is being logged
RETRIES = 3  # TorchServe restarts killed workers; one that was killed this often will not start
LOG_PREFIX = re.compile(r"^\S+ \[\w+ *\] (\S+) (\S+ )?- ")


def wait_until_ready(
    server: Server,
    running: Running,
    folders: list[ModelFolder],
    seconds: float,
    progress: Callable[[str, WorkerCount], None],
) -> None:
    """Wait until every model has its workers READY.

    Args:
        seconds: to wait at most.
        progress: called with each model's name and count of workers, at each poll.

    Raises:
        BundleError: the server or a worker died, or the wait timed out; the details are the cause, from the logs.
    """
    client = running.client()
    deadline = time.monotonic() + seconds
    while True:
        if running.process() is None:
            raise BundleError("TorchServe ended while it started.", last_words(server))
        counts = {folder.name: count_workers(client, folder.name) for folder in folders}
        for name, count in counts.items():
            progress(name, count)
        if all(count.ready >= count.wanted for count in counts.values()):
            return
        waiting = [name for name, count in counts.items() if count.ready < count.wanted]
        for name in waiting:
            if failure := worker_failure(server.logs, name):
                raise failure
        if time.monotonic() > deadline:
            raise BundleError(
                f"After {seconds:.0f} s the workers of {', '.join(waiting)} are not READY.", last_words(server)
            )
        time.sleep(POLL_SECONDS)


def count_workers(client: Client, model: str) -> WorkerCount:
    """Count a model's workers; none while the management API does not answer.

    Raises:
        Untrusted: its certificate is not trusted, which no waiting changes.
    """
    try:
        return client.workers(model)
    except Untrusted:
        raise
    except requests.RequestException:
        return WorkerCount(0, 1)


def start_version(
    client: Client, logs: Path, archive: str, model: str, version: str, workers: tuple[int, int], seconds: float
) -> None:
    """Register an archive of the store, and wait until its workers are READY.

    Args:
        version: the archive's own version.
        workers: minimum and maximum number.
        seconds: to wait at most.

    Raises:
        AlreadyRegistered: somebody else has registered it.
        BundleError: it is rejected, or its workers do not become READY; the details are the cause, from the logs.
    """
    since = datetime.now()
    try:
        client.register(archive, model, workers=0)
    except AlreadyRegistered:
        raise
    except BundleError as exc:
        raise worker_failure(logs, model, version, since) or exc from exc
    scale_version(client, logs, model, version, workers, seconds)


def scale_version(
    client: Client, logs: Path, model: str, version: str, workers: tuple[int, int], seconds: float
) -> None:
    """Set the minimum and maximum number of workers, and wait until they are READY.

    Raises:
        BundleError: they do not become READY; the details are the cause, from the logs.
    """
    since = datetime.now()
    deadline = time.monotonic() + seconds
    client.scale(model, version, *workers)
    while workers[0] and (count := client.workers(model, version)).ready < count.wanted:
        if failure := worker_failure(logs, model, version, since):
            raise failure
        if time.monotonic() > deadline:
            raise BundleError(f"After {seconds:.0f} s the workers of {model} {version} are not READY.")
        time.sleep(POLL_SECONDS)


def worker_failure(
    logs: Path, model: str, version: str | None = None, since: datetime = datetime.min
) -> BundleError | None:
    """Return why a model's workers do not become READY: an exception, or repeated kills; None if neither is logged.

    Args:
        version: by default, all versions.
        since: ignore log lines before this time.
    """
    said = lines_by_worker(logs / "model_log.log", model, version, since)
    if any(WORKER_DIED in line for lines in said.values() for line in lines):
        for _ in range(TRACE_PAUSES):  # TorchServe logs a traceback line by line: it is whole when it grows no more
            time.sleep(POLL_SECONDS)
            known, said = said, lines_by_worker(logs / "model_log.log", model, version, since)
            if said == known:
                break
        died = [lines for lines in said.values() if any(WORKER_DIED in line for line in lines)]
        what, trace = explain(died[-1])
        return BundleError(f"A worker of {model} failed: {what}", trace)
    told = lines_by_worker(logs / "ts_log.log", model, version, since)
    if sum(WORKER_RETRIED in line for lines in told.values() for line in lines) >= RETRIES:
        free = psutil.virtual_memory().available / 2**30
        last = [line for lines in (*told.values(), *said.values()) for line in lines[-10:] if line[:1] != "\t"]
        if any(each in line for lines in told.values() for line in lines for each in WORKER_TIMED_OUT):
            return BundleError(
                f"Workers of {model} do not start within the startupTimeout of its model-config.yaml: the machine is "
                "busy, or the model takes longer to load. Wait and try again, or set a longer one.",
                "\n".join(last),
            )
        return BundleError(
            f"Workers of {model} end before they are READY, without an exception: their code ended the process, or it "
            f"was killed, for example for lack of memory. {free:.1f} GiB are free.",
            "\n".join(last),
        )
    return None


def lines_by_worker(log: Path, model: str, version: str | None, since: datetime) -> dict[str, list[str]]:
    """Return the lines of a log that are from each of the workers of `model`, without the log's prefix.

    A line without a prefix, such as a Java exception's, belongs to the one before it.
    """
    any_version = r"[^_]+?"
    thread = re.compile(rf"(W-\d+)-{re.escape(model)}_{re.escape(version) if version else any_version}(-std|$)")
    earliest = since.isoformat(timespec="milliseconds").replace(".", ",")
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found: dict[str, list[str]] = {}
    worker = None
    for line in lines:
        if match := LOG_PREFIX.match(line):
            worker = thread.match(match[1]) if line >= earliest else None
        if worker:
            found.setdefault(worker[1], []).append(line[match.end() :] if match else line)
    return found


def last_words(server: Server, lines: int = 20) -> str:
    """Return the last errors and warnings of the server's log, and the last lines of its console."""
    log = server.logs / "ts_log.log"
    told = log.read_text(errors="replace").splitlines() if log.is_file() else []
    words = [line for line in told if re.search(r"\[(ERROR|WARN) *\]|Exception", line)][-lines:]
    words += server.console.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(words) or f"The logs in {server.logs} have no errors."
