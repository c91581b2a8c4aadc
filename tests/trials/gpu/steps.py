"""The steps. Each runs in a process of its own, whose first GPU is the device: `python -m tests.trials.gpu.steps`."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from bundle import machine, mar, samples
from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder, select
from bundle.paths import ROOT
from handlers.core import replay
from loadtest.bench.cases import CASES, Case
from loadtest.bench.devices import CPU, TURNS, measure_case, timed
from loadtest.bench.limit import content, dry_run
from tests.shipped import ON_REQUEST, SHIPPED
from tests.trials.gpu import networks, server
from tests.trials.gpu.compare import deviation, explanation_deviation
from tests.trials.gpu.record import Checks, Record

MODELS = [*SHIPPED, *ON_REQUEST]
SIZES = (1, 8, 64, 256)  # of the batches whose throughput is measured
SMALL_SIZES = (1, 8)  # of large networks on the CPU
SECONDS = 1.0  # length of the measurement of a batch size on a device
FURTHER_INPUTS = {"molecule": [{"data": {"nodes": [0], "edges": []}}]}  # an empty tensor is copied to the device
REHEARSAL = "REHEARSAL"  # an environment variable: the device is the CPU
MIB = 2**20
WORK = ROOT / "build" / "gpu-check"  # archives and networks, wherever the results are


def gpu() -> int | None:
    return None if os.environ.get(REHEARSAL) else 0


def units(checks: Checks, folder: Path) -> None:
    def run() -> dict:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_gpu.py"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        summary = (ended.stdout.strip().splitlines() or [""])[-1]
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
        assert gpu() is None or "skipped" not in summary, f"tests were skipped on a GPU: {summary}"
        return {"pytest": summary.strip("= ")}

    checks.run("tests/unit/test_gpu.py", run)


def answers(checks: Checks, folder: Path) -> None:
    """Compare the workers' answers to samples: alone, in a small batch, and in a full one."""
    for model in select(MODELS):
        checks.run(model.name, lambda model=model: compared(model, explain=False))
    if find_spec("captum") is None:
        checks.note("explanations", skipped="captum is not installed")
        return
    for model in select(MODELS):
        checks.run(f"explanation, {model.name}", lambda model=model: compared(model, explain=True))


def compared(model: ModelFolder, explain: bool) -> dict:
    file = archived(model)
    row, header = sample(model)
    rows = [row] if explain else [row, *({"body": each} for each in FURTHER_INPUTS.get(model.name, []))]
    header |= {"explain": "True"} if explain else {}
    compare = explanation_deviation if explain else deviation
    full = mar.config(file).get("batchSize", 1)
    with DryRun(file) as on_cpu, DryRun(file, gpu=gpu()) as worker:
        assert worker.handler.device.type == (CPU if gpu() is None else "cuda"), f"it uses {worker.handler.device}"
        expected, worst, slowest = answered(on_cpu, rows, header), 0.0, 0.0
        for size in [1] if explain else dict.fromkeys([1, 5, full]):
            batch = [index % len(rows) for index in range(size)]
            start = time.perf_counter()
            found = answered(worker, [rows[index] for index in batch], header)
            slowest = max(slowest, time.perf_counter() - start)  # kernels may still be compiled for a new size
            worst = max(worst, *(compare(expected[i], each) for i, each in zip(batch, found, strict=True)))
        precisions = f"{worker.handler.precision} (CPU: {on_cpu.handler.precision})"
        return {"deviation": worst, "precision": precisions, "slowest batch ms": 1000 * slowest}


def archived(model: ModelFolder) -> Path:
    return archive(model, WORK / "store").path


def sample(model: ModelFolder) -> tuple[dict, dict[str, str]]:
    """Return a model's sample, as TorchServe passes it to a handler, and its headers."""
    assert model.sample_file is not None, f"{model.name} has no sample"
    header, raw = samples.headers(model.sample_file), model.sample_file.read_bytes()
    return ({"body": json.loads(raw)} if header else {"body": raw}), header


def answered(worker: DryRun, rows: list[dict], header: dict[str, str]) -> list[dict]:
    found = worker.predict(rows, [header] * len(rows))
    assert {status for status, _ in found} == {200}, found[:3]
    return [body for _, body in found]


def serve(checks: Checks, folder: Path) -> None:
    server.check(checks, folder, WORK / "store", gpu=gpu() is not None)


def throughput(checks: Checks, folder: Path) -> None:
    """Measure whole batches on the device and on the CPU, as `make bench-gpu` does."""
    for name in ("mnist", "text", *networks.NAMES):
        checks.run(name, lambda name=name: measured(checks, case(name)))


def case(name: str) -> Case:
    return networks.network(name, WORK / "networks") if name in networks.NAMES else CASES[name]


def measured(checks: Checks, case: Case) -> None:
    """Measure both devices in turns; a large network first on the CPU, where a worker warms up with small batches."""
    gpus = [] if gpu() is None else ["0"]
    apart = [([CPU], SMALL_SIZES), *([(gpus, SIZES)] if gpus else [])]
    on_cpu: dict[int, float] = {}
    for devices, sizes in apart if isinstance(case, networks.Network) else [([CPU, *gpus], SIZES)]:
        for timing in measure_case(case, devices, sizes, SECONDS):
            values = {"requests/s": timing.rate, "batch ms": 1000 * timing.batch_seconds, "precision": timing.precision}
            values["inference"] = f"{timing.inference_seconds / timing.batch_seconds:.0%}"
            if timing.device == CPU:
                on_cpu[timing.batch] = timing.rate
            else:
                values["× one CPU thread"] = timing.rate / on_cpu.get(timing.batch, max(on_cpu.values()))
            device = "CPU" if timing.device == CPU else "GPU"
            checks.note(f"{case.name}, batch {timing.batch}, {device}", **values)


def options(checks: Checks, folder: Path) -> None:
    """Compare and measure what can be turned off: page-locked memory, and CUDA graphs, which are off by default."""
    for model in select([*SHIPPED, "membrane"]):
        checks.run(f"{model.name}, answers", lambda model=model: same_answers(model))
    for name in ("mnist", "audio", *networks.NAMES):
        checks.run(f"{name}, time of inference", lambda name=name: measured_options(checks, case(name)))


def same_answers(model: ModelFolder) -> dict:
    """Compare a worker's answers with and without CUDA graphs."""
    file, (row, header) = archived(model), sample(model)
    sizes = dict.fromkeys([1, 5, mar.config(file).get("batchSize", 1)])
    with DryRun(file, gpu=gpu()) as worker:
        expected = {size: answered(worker, [row] * size, header) for size in sizes}
        before = used()
        worker.handler.model = with_graphs(worker)
        taken = used() - before
        pairs = [zip(expected[size], answered(worker, [row] * size, header), strict=True) for size in sizes]
        worst = max(deviation(*pair) for each in pairs for pair in each)
        return {"deviation": worst, "recorded": recorded(worker.handler.model), "MiB": taken / MIB}


def measured_options(checks: Checks, case: Case) -> dict:
    """Measure collation, copies and module; the ways take turns."""
    sizes, turns = (SIZES, TURNS) if gpu() is not None else (SMALL_SIZES[:1], 1)
    with dry_run(case, gpu(), max(sizes)) as worker:
        handler, samples = worker.handler, worker.decode({"body": content(case)})
        pinned, plain, graphs = handler.staging.pinned, handler.model, with_graphs(worker)
        ways = {"ordinary": (False, plain), "page-locked": (pinned, plain), "and CUDA graphs": (pinned, graphs)}
        for size in sizes:
            times: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(1 + turns):  # the first is not counted
                for name, (handler.staging.pinned, handler.model) in ways.items():
                    seconds = timed(lambda size=size: handler.predict(samples * size), SECONDS / turns / len(ways))
                    times[name] += [seconds] if turn else []
            values = {f"{name} ms": 1000 * statistics.median(each) for name, each in times.items()}
            checks.note(f"{case.name}, batch {size}", **values)
        return {"recorded": recorded(graphs)}


@torch.inference_mode()
def with_graphs(worker: DryRun) -> replay.Module:
    """Return a worker's module as it is with the setting `cuda_graphs`; the step's log says why, if it is the same."""
    handler = worker.handler
    name = handler.context.model_name
    return replay.replayed(handler.model, handler.example_batch, handler.run_size, handler.device, name)


def recorded(module: replay.Module) -> str:
    return ", ".join(map(str, module.sizes)) if isinstance(module, replay.Replayed) else "nothing"


def memory(checks: Checks, folder: Path) -> None:
    """Measure what the device, or in a rehearsal this process, uses: bare, with a model, after its largest batch."""
    if gpu() is not None:
        torch.zeros(1, device="cuda")
    checks.note("a process without a model", MiB=used() / MIB)
    for model in select(MODELS):
        checks.run(model.name, lambda model=model: memory_of(model))


def memory_of(model: ModelFolder) -> dict:
    file, (row, header) = archived(model), sample(model)
    if gpu() is not None:
        torch.cuda.empty_cache()
    before, size = used(), mar.config(file).get("batchSize", 1)
    with DryRun(file, gpu=gpu()) as worker:
        loaded = used()
        for _ in range(3):
            answered(worker, [row] * size, header)
        return {"loaded MiB": (loaded - before) / MIB, f"after batches of {size}, MiB": (used() - before) / MIB}


def used() -> int:
    """Return the bytes of the device that are in use; in a rehearsal, of this process's memory."""
    if gpu() is None:
        return psutil.Process().memory_info().rss
    free, total = torch.cuda.mem_get_info(0)
    return total - free


@dataclass(frozen=True)
class Plan:
    """A step: its title in the report, its limit in seconds, and the function that runs its checks."""

    title: str
    limit: float
    run: Callable[[Checks, Path], None]


STEPS = {
    "units": Plan("Unit tests", 150, units),
    "answers": Plan("Answers, compared with the CPU's", 150, answers),
    "server": Plan("A server", 150, serve),
    "throughput": Plan("Throughput", 240, throughput),
    "options": Plan("Page-locked memory and CUDA graphs", 120, options),
    "memory": Plan("Memory of a worker", 120, memory),
}


def open_record(folder: Path, gpus: list[str]) -> Record:
    """Return the record in the folder of a device.

    Args:
        gpus: the name of the GPU; empty in a rehearsal.
    """
    device = ", ".join(gpus) or "none: a rehearsal on the CPU"
    return Record(folder, {name: plan.title for name, plan in STEPS.items()}, {"GPU": device, **machine.about()})


def main(name: str, folder: str) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
        STEPS[name].run(Checks(open_record(Path(folder), machine.gpus()), name), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
