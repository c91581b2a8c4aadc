"""Measure where a request's time goes: its stages, processor time by process, and a flame graph of a worker."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.load.generator import LoadResult, closed_loop
from bundle.paths import ROOT
from bundle.samples import headers
from bundle.server.client import Client
from bundle.server.http import session
from bundle.server.process import Running
from bundle.server.settings import Settings

STAGES = ("decode", "inference", "encode")
QUEUE = "ts_queue_latency_microseconds_total"  # TorchServe's counter; the parser adds _total
SAMPLES_A_SECOND = 250
WARM_UP_SECONDS = 2.0


@dataclass(frozen=True)
class Profile:
    """Where the time of one model's requests went.

    Attributes:
        load: what the clients saw.
        batch_size: mean number of requests in a batch.
        queue: mean seconds that a request waits for its batch and for a worker.
        stages: mean seconds that a batch spends in each stage of the handler.
        cpu: mean processor time of a request, in seconds, of the frontend (Java) and of the model's workers.
        graph: the file of the flame graph.
    """

    load: LoadResult
    batch_size: float
    queue: float
    stages: dict[str, float]
    cpu: dict[str, float]
    graph: Path

    def table(self) -> Table:
        """Return the times as a table."""
        table = Table("where", "ms", "of")
        table.add_row("queue", f"{1000 * self.queue:.2f}", "a request")
        for stage, seconds in self.stages.items():
            table.add_row(stage, f"{1000 * seconds:.2f}", f"a batch of {self.batch_size:.1f} on average")
        for process, seconds in self.cpu.items():
            table.add_row(f"CPU of the {process}", f"{1000 * seconds:.3f}", "a request")
        table.add_row("p50, as clients see it", f"{1000 * self.load.p50:.2f}", "a request")
        table.add_row("p99", f"{1000 * self.load.p99:.2f}", "a request")
        return table


def profile(running: Running, settings: Settings, folder: ModelFolder, concurrency: int, seconds: float) -> Profile:
    """Load a served model with its sample, measure, and draw a flame graph of a worker.

    Half of the time is for the measurements and half for the graph, because sampling slows the worker down.

    Raises:
        NotRunning: the model is not served.
        BundleError: it has no workers, py-spy or wrk is missing, py-spy has no permission to read a worker's
            memory, or the server requires tokens.
    """
    if running.keys():  # wrk takes headers as arguments, which every user of the machine can read
        raise BundleError("The server requires tokens, which `profile` does not support. Serve without tokens.")
    workers = worker_pids(running.client(), folder)
    if folder.bundle.sample is None:
        raise BundleError(f"{folder.name} has no sample to send. Set bundle: sample: in its model-config.yaml.")
    py_spy("dump", workers[0])  # a missing permission shows before the load
    sample = folder.existing(folder.bundle.sample)
    content = sample.read_bytes()

    def loaded(seconds: float) -> LoadResult:
        url = f"{running.inference}/predictions/{folder.name}"
        return closed_loop(url, content, headers(sample), concurrency, seconds)

    loaded(WARM_UP_SECONDS)
    before, cpu_before = sums(settings, folder), cpu_seconds(running, workers)
    load = loaded(seconds / 2)
    after, cpu_after = sums(settings, folder), cpu_seconds(running, workers)
    if not load.answered or not after.get("bundle_batch_size_count"):
        raise BundleError(
            f"{folder.name} answered no request, or its handler is not a BatchHandler. See the log: make logs"
        )
    graph = ROOT / "build" / "profile" / f"{folder.name}.svg"
    graph.parent.mkdir(parents=True, exist_ok=True)
    sampled = max(1, round(seconds / 2))  # py-spy needs whole seconds
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(loaded, sampled)
        py_spy("record", workers[0], f"--duration={sampled}", f"--rate={SAMPLES_A_SECOND}", f"--output={graph}")
        loading.result()  # raises its exception, if any
    gained = {name: after[name] - before.get(name, 0) for name in after}
    batches, requests = gained["bundle_batch_size_count"], gained["bundle_batch_size_sum"]
    queue = gained[QUEUE] / 1e6 / requests
    stages = {
        stage: gained[f"bundle_{stage}_seconds_sum"] / batches
        for stage in STAGES
        if gained.get(f"bundle_{stage}_seconds_count")
    }
    cpu = {process: (cpu_after[process] - cpu_before[process]) / load.answered for process in cpu_after}
    return Profile(load, requests / batches, queue, stages, cpu, graph)


def worker_pids(client: Client, folder: ModelFolder) -> list[int]:
    """Return the process ids of the model's workers.

    Raises:
        NotRunning: the model is not served.
        BundleError: it has no workers.
    """
    described = client.describe(folder.name)
    if described is None:
        raise client.not_served(folder.name)
    pids = [worker["pid"] for worker in described["workers"] if worker["pid"] > 0]
    if not pids:
        raise BundleError(f"{folder.name} has no workers. Start them, or see why they do not start: make serve")
    return pids


def sums(settings: Settings, folder: ModelFolder) -> dict[str, float]:
    """Return TorchServe's and the bundle's counters of the model by name, summed over its versions."""
    text = session.get(f"{settings.url('metrics_address')}/metrics", timeout=10).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("ModelName", sample.labels.get("model_name"))
            if name == folder.name and not sample.name.endswith("_bucket"):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def cpu_seconds(running: Running, workers: list[int]) -> dict[str, float]:
    """Return the user and system time (s) of the frontend, and of the model's workers together.

    Raises:
        BundleError: a process has ended.
    """

    def of(pid: int) -> float:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system

    try:
        return {"frontend": of(running.pid), "workers": sum(map(of, workers))}
    except psutil.NoSuchProcess as exc:
        raise BundleError("The server or a worker ended during the measurement. See the log: make logs") from exc


def py_spy(command: str, pid: int, *options: str) -> None:
    """Run py-spy on a process, which it neither changes nor restarts.

    Raises:
        BundleError: py-spy is missing, or has no permission to read the process's memory.
    """
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        raise BundleError("py-spy is missing. Install it: make dev")
    ended = subprocess.run(
        [program, command, "--pid", str(pid), "--nonblocking", *options], capture_output=True, text=True
    )
    if ended.returncode:
        raise BundleError(
            "py-spy could not read a worker's memory. If the permission is missing, run the command as root, or allow "
            "it: sysctl kernel.yama.ptrace_scope=0",
            ended.stdout + ended.stderr,
        )
