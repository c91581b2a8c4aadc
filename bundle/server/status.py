"""What a running server serves, for people and for programs."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil
from rich.table import Table

from bundle.errors import NotRunning
from bundle.server.process import Running


@dataclass(frozen=True)
class Workers:
    """The workers of a model.

    Attributes:
        ready: workers that are READY.
        min, max: between which the management API scales them.
    """

    ready: int
    min: int
    max: int


@dataclass(frozen=True)
class ModelStatus:
    """The default version of a model, as the management API describes it.

    Attributes:
        max_batch_delay_ms: how long a batch waits to fill.
        queue: requests that wait; None where the API does not say.
    """

    name: str
    version: str
    workers: Workers
    batch_size: int
    max_batch_delay_ms: int
    queue: int | None

    @property
    def healthy(self) -> bool:
        """Whether no worker is missing."""
        return self.workers.ready >= self.workers.min


@dataclass(frozen=True)
class Status:
    """A running server.

    Attributes:
        pid: of the Java process.
        child_processes: workers and their helpers.
        memory_bytes: of all these processes.
        memory_kind: how it was measured: "PSS" or "RSS", see `memory`.
        patches: the state of each patch of the frontend: "in", "off", or "refused: " and the reason.
    """

    pid: int
    child_processes: int
    memory_bytes: int
    memory_kind: str
    models: list[ModelStatus]
    patches: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether no model lacks a worker."""
        return all(model.healthy for model in self.models)

    def missing(self) -> str:
        """Return a sentence about the models that lack a worker; "" if none does."""
        lacking = [
            f"{each.name} has {each.workers.ready} of {each.workers.min}" for each in self.models if not each.healthy
        ]
        return f"Workers are missing: {', '.join(lacking)}." if lacking else ""

    def as_dict(self) -> dict:
        """Return what `bundle status --json` prints."""
        return {"running": True, "healthy": self.healthy, **asdict(self)}

    def table(self) -> Table:
        """Return the models, one a row."""
        table = Table("model", "version", "workers READY", "min", "max", "batch", "delay ms", "queued")
        for model in self.models:
            workers = (model.workers.ready, model.workers.min, model.workers.max)
            queued = "" if model.queue is None else model.queue
            row = (model.name, model.version, *workers, model.batch_size, model.max_batch_delay_ms, queued)
            table.add_row(*map(str, row))
        return table

    def process(self) -> str:
        """Return a line about the processes."""
        used = f"{self.memory_bytes / 2**30:.1f} GiB of memory ({self.memory_kind})"
        return f"PID {self.pid}, {self.child_processes} child processes, {used}"

    def frontend(self) -> str:
        """Return a line about the frontend's patches."""
        applied = [name for name, state in self.patches.items() if state == "in"]
        others = [f"{name} is {state}" for name, state in self.patches.items() if state != "in"]
        return "; ".join([f"patches of the frontend: {', '.join(applied) or 'none'}", *others])


def status_of(running: Running, patches: dict[str, str]) -> Status:
    """Ask the management API and the operating system.

    Args:
        patches: as in `Status`.

    Raises:
        NotRunning: the server has ended.
    """
    client = running.client()
    models = [model_status(name, found) for name in client.models() if (found := client.describe(name))]
    process = running.process()
    if process is None:
        raise NotRunning("TorchServe has ended. See the log: make logs")
    family = [process, *process.children(recursive=True)]
    return Status(running.pid, len(family) - 1, *memory(family), models, patches)


def memory(processes: list[psutil.Process]) -> tuple[int, str]:
    """Return the memory that processes take together, in bytes, and how it was measured.

    "PSS" (proportional set size): a page that several of them share, such as those of torch's libraries, counts once.
    "RSS" (resident set size): it counts in each, so that the sum is too large. This is what is left where the system
    does not show PSS, as of another user's processes.
    """

    def total(read: Callable[[psutil.Process], int]) -> int:
        found = 0
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found += read(process)
        return found

    try:
        return total(lambda process: process.memory_full_info().pss), "PSS"
    except (psutil.AccessDenied, AttributeError):  # a kernel without /proc/PID/smaps
        return total(lambda process: process.memory_info().rss), "RSS"


def model_status(name: str, described: dict) -> ModelStatus:
    """Read the management API's description of a model."""
    ready = sum(worker["status"] == "READY" for worker in described["workers"])
    return ModelStatus(
        name=name,
        version=described["modelVersion"],
        workers=Workers(ready, described["minWorkers"], described["maxWorkers"]),
        batch_size=described["batchSize"],
        max_batch_delay_ms=described["maxBatchDelay"],
        queue=described.get("jobQueueStatus", {}).get("pendingRequests"),
    )
