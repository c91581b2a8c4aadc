"""Where a request's time goes: stages, processor time by process, and a flame graph of a worker."""

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
from bundle.load.generator import Load, closed_loop
from bundle.paths import ROOT
from bundle.server.client import Client
from bundle.server.http import session
from bundle.server.process import Running
from bundle.server.settings import Settings

STAGES = ("decode", "inference", "encode")
QUEUE = "ts_queue_latency_microseconds_total"  # TorchServe's own, of requests; the parser puts _total behind a counter
SAMPLES_A_SECOND = 250
WARM_UP_SECONDS = 2.0
MIME = "application/octet-stream"


@dataclass(frozen=True)
class Profile:
    """What a load of one model showed.

    Attributes:
        load: what the clients saw.
        batch_size: the mean, in requests.
        queue: seconds a request waits for its batch and for a worker, on average.
        stages: seconds a batch spends in each stage of the handler, on average.
        cpu: seconds of processor time a request, of the frontend (Java) and of the model's workers.
        graph: the flame graph.
    """

    load: Load
    batch_size: float
    queue: float
    stages: dict[str, float]
    cpu: dict[str, float]
    graph: Path

    def table(self) -> Table:
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
    """Loads a served model with its sample: half of the seconds to measure the server undisturbed, half to draw the
    graph, as sampling slows the worker down.

    Raises:
        BundleError: the model is not served, py-spy or wrk is missing, py-spy may not look into a worker, or the server
            asks for keys.
    """
    if running.keys():  # wrk takes headers as arguments, which everybody on the machine can read
        raise BundleError("The server asks for keys, which the load generator is not given: serve without them.")
    workers = worker_pids(running.client(), folder)
    if folder.bundle.sample is None:
        raise BundleError(f"{folder.name} has no sample to send: set `sample` in its model-config.yaml.")
    py_spy("dump", workers[0])  # what it may not do, it says before the load
    content = folder.existing(folder.bundle.sample).read_bytes()

    def loaded(seconds: float) -> Load:
        url = f"{running.inference}/predictions/{folder.name}"
        return closed_loop(url, content, {"Content-Type": MIME}, concurrency, seconds)

    loaded(WARM_UP_SECONDS)
    before, cpu_before = sums(settings, folder), cpu_seconds(running, workers)
    load = loaded(seconds / 2)
    after, cpu_after = sums(settings, folder), cpu_seconds(running, workers)
    if not load.answered or not after.get("bundle_batch_size_count"):
        raise BundleError(f"{folder.name} answered none of the requests, or has no handler of the bundle: make logs")
    graph = ROOT / "build" / "profile" / f"{folder.name}.svg"
    graph.parent.mkdir(parents=True, exist_ok=True)
    sampled = max(1, round(seconds / 2))  # py-spy takes whole seconds
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(loaded, sampled)
        py_spy("record", workers[0], f"--duration={sampled}", f"--rate={SAMPLES_A_SECOND}", f"--output={graph}")
        loading.result()  # or what went wrong in it
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
    described = client.describe(folder.name)
    pids = [worker["pid"] for worker in (described or {}).get("workers", []) if worker["pid"] > 0]
    if not pids:
        raise BundleError(f"{folder.name} is not served, or has no worker: make serve MODELS={folder.name}")
    return pids


def sums(settings: Settings, folder: ModelFolder) -> dict[str, float]:
    """TorchServe's and the bundle's counters of the model, over all its versions, by name."""
    text = session.get(f"{settings.url('metrics_address')}/metrics", timeout=10).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("ModelName", sample.labels.get("model_name"))
            if name == folder.name and not sample.name.endswith("_bucket"):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def cpu_seconds(running: Running, workers: list[int]) -> dict[str, float]:
    """User and system time of the frontend, and of the model's workers together."""

    def of(pid: int) -> float:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system

    try:
        return {"frontend": of(running.pid), "workers": sum(map(of, workers))}
    except psutil.NoSuchProcess as exc:
        raise BundleError("The server or a worker ended while it was watched: make logs") from exc


def py_spy(command: str, pid: int, *options: str) -> None:
    """Has py-spy look into a process from outside, which neither changes it nor starts it again.

    Raises:
        BundleError: it is missing, or cannot look into the process.
    """
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        raise BundleError("py-spy is missing: pip install -r requirements/dev.txt")
    looked = subprocess.run(
        [program, command, "--pid", str(pid), "--nonblocking", *options], capture_output=True, text=True
    )
    if looked.returncode:
        raise BundleError(
            "py-spy could not look into a worker. Where it lacks the permission, run it as root, or allow it: "
            "sysctl kernel.yama.ptrace_scope=0",
            looked.stdout + looked.stderr,
        )
