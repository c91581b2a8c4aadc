"""Waits until a server that was just started serves, or says why it does not."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import requests

from bundle.catalog import ModelFolder
from bundle.client import Client, WorkerCount
from bundle.errors import BundleError
from bundle.server import Running, Server

POLL_SECONDS = 0.3
WORKER_DIED = "Backend worker process died"
WORKER_LOST = "Worker disconnected"
LOG_PREFIX = re.compile(r"^\S+ \[\w+ *\] (\S+) - ")


def wait_until_ready(
    server: Server, running: Running, folders: list[ModelFolder], seconds: float, progress: Callable[[str, WorkerCount], None]
) -> None:
    """Returns when every model has its workers READY.

    Args:
        seconds: to wait at most.
        progress: is told each model's name and count of workers, again and again.

    Raises:
        BundleError: the server or a worker died, or the time is over; with the cause out of the logs.
    """
    client = server.settings.client()
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
        if failure := worker_failure(server.logs, waiting):
            raise failure
        if time.monotonic() > deadline:
            raise BundleError(
                f"After {seconds:.0f} s the workers of {', '.join(waiting)} are not READY.", last_words(server)
            )
        time.sleep(POLL_SECONDS)


def count_workers(client: Client, model: str) -> WorkerCount:
    try:
        return client.workers(model)
    except requests.RequestException:
        return WorkerCount(0, 1)


def worker_failure(logs: Path, models: list[str]) -> BundleError | None:
    """Why a worker of these models died, by what it said last."""
    for model in models:
        said = worker_output(logs, model)
        if not any(WORKER_DIED in line for line in said):
            if any(WORKER_LOST in line for line in said):
                free = psutil.virtual_memory().available / 2**30
                return BundleError(f"A worker of {model} was killed; {free:.1f} GiB of memory are free.", "\n".join(said))
            continue
        start = max((i for i, line in enumerate(said) if line.startswith("Traceback")), default=0)
        trace = said[start:]
        errors = [line for line in trace if re.match(r"^[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
        return BundleError(f"A worker of {model} failed: {errors[-1] if errors else trace[-1]}", "\n".join(trace))
    return None


def worker_output(logs: Path, model: str) -> list[str]:
    """What the workers of `model` printed, without the log's own prefix."""
    file = logs / "model_log.log"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    said = []
    for line in lines:
        match = LOG_PREFIX.match(line)
        if match and re.match(rf"W-\d+-{re.escape(model)}_", match[1]):
            said.append(line[match.end() :])
    return said


def last_words(server: Server, lines: int = 20) -> str:
    """The last errors and warnings of the server's logs, and what it printed on its console."""
    words = []
    for file in (server.logs / "ts_log.log", server.console):
        if file.is_file():
            text = file.read_text(errors="replace").splitlines()
            words += [line for line in text if re.search(r"ERROR|WARN|Exception|rror|insufficient", line)][-lines:]
    return "\n".join(words) or f"The logs in {server.logs} say nothing."
