"""A real TorchServe with GPU workers: predictions, metrics, a killed worker, memory that does not suffice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from bundle.build.archive import archive
from bundle.catalog import ModelFolder, select
from bundle.server.client import check_sample
from tests.server.place import Place, new_place
from tests.support import batches, wait_for
from tests.traffic import Traffic
from tests.trials.gpu.record import Checks

MODELS = ("mnist", "text", "cells")
ROWS = 300  # requests of a phase of load
CLIENTS = 16
IMPOSSIBLE = 1 << 30  # MiB; more than any device has
HOG = "import sys, tests.trials.gpu.server as server; server.occupy(int(sys.argv[1]))"
FREE = 256  # MiB that the other process leaves
[MNIST] = select(["mnist"])


def check(checks: Checks, folder: Path, store: Path, gpu: bool) -> None:
    """Run the checks on one server, which serves two workers of each model on one device."""
    place = new_place(folder / "run", store)
    try:
        if not checks.run("start", lambda: started(place), needed=True):
            return
        checks.run("workers on the device", lambda: on_device(place, gpu))
        checks.run("samples", lambda: samples(place))
        checks.run("load on two workers of one device", lambda: load(place))
        checks.run("metrics", lambda: metrics(place))
        checks.run("kill -9 of one worker", lambda: kill_one(place))
        if gpu:
            checks.note("memory of the worker processes", **process_memory(place))
        if checks.run("a model that takes memory", lambda: register(place), needed=True):
            checks.run("an input that does not fit", lambda: too_large(place))
            if gpu:
                checks.run("a batch that does not fit", lambda: large_batch(place))
                checks.run("memory that another process occupies", lambda: occupied(place))
            else:
                checks.note("a batch that does not fit, occupied memory", skipped="only on a GPU")
    finally:
        checks.run("stop", lambda: stopped(place), needed=True)


def started(place: Place) -> dict:
    start = time.monotonic()
    run = place.bundle("serve", *MODELS)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"[-3000:]
    return {"seconds until every model works": time.monotonic() - start}


def stopped(place: Place) -> dict:
    run = place.bundle("stop")
    assert run.returncode == 0, run.stderr
    left = [" ".join(each.cmdline())[:200] for each in place.processes()]
    assert not left, f"processes are left: {left}"
    return {}


def workers(place: Place, model: str) -> list[dict]:
    return place.client.describe(model)["workers"]


def pids(place: Place, model: str) -> set[int]:
    return {each["pid"] for each in workers(place, model) if each["status"] == "READY"}


def on_device(place: Place, gpu: bool) -> dict:
    found = {model: [each["gpu"] for each in workers(place, model)] for model in MODELS}
    assert all(each == [gpu, gpu] for each in found.values()), f"gpu of the workers: {found}"
    return {"gpu": found["mnist"], "usage": workers(place, "mnist")[0].get("gpuUsage", "")}


def samples(place: Place) -> dict:
    return {folder.name: check_sample(place.client, folder) for folder in select(list(MODELS))}


def traffic(place: Place) -> Traffic:
    url = f"{place.url('inference_address')}/predictions/mnist"
    assert MNIST.sample_file is not None
    return Traffic(url, MNIST.sample_file.read_bytes(), '"top_3_classes": [3', clients=CLIENTS, pause=0.0)


def load(place: Place) -> dict:
    start = time.monotonic()
    with traffic(place) as sent:
        sent.wait_for(ROWS)
    assert set(sent.counts) == {200}, sent.counts
    return {"requests/s": sent.counts.total() / (time.monotonic() - start)}


def metrics(place: Place) -> dict:
    count, total = batches(place.url("metrics_address"), "mnist")
    assert count > 0, "the handler's metrics are missing"
    return {"batches": int(count), "mean batch": total / count}


def kill_one(place: Place) -> dict:
    before = pids(place, "mnist")
    with traffic(place) as sent:
        sent.wait_for(ROWS)
        os.kill(min(before), signal.SIGKILL)
        start = time.monotonic()
        wait_for(lambda: len(now := pids(place, "mnist")) == 2 and min(before) not in now, 90)
        seconds = time.monotonic() - start
        sent.wait_for(ROWS)
    # the frontend gives the requests of a worker that ended to the other one
    assert set(sent.counts) == {200}, f"requests failed: {sent.counts}"
    return {"seconds until two are ready": seconds, "answered": sent.counts[200]}


def process_memory(place: Place) -> dict:
    """Return the MiB of each worker, as nvidia-smi reports them; it may not see the processes of a container."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.CalledProcessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        used = {int(pid): memory for pid, memory in (line.split(", ") for line in lines)}
        return {m: [used.get(pid, "unknown") for pid in pids(place, m)] for m in MODELS} | {"unit": "MiB"}
    return {"nvidia-smi": "does not answer"}


def register(place: Place) -> dict:
    archive(ModelFolder(Path(__file__).parent / "gigabytes"), place.store)
    if place.client.describe("gigabytes") is None:
        place.client.register("gigabytes.mar", "gigabytes", 1)
    assert ask(place, 1) == 200
    return {}


def ask(place: Place, mib: int) -> int:
    """Return the status of a request for this memory; the answer of a 200 must be right."""
    url = f"{place.url('inference_address')}/predictions/gigabytes"
    answer = requests.post(url, json={"data": {"mib": mib}}, timeout=60)
    assert answer.status_code != 200 or answer.json() == {"mib": mib}, answer.text
    return answer.status_code


def together(place: Place, amounts: list[int]) -> list[int]:
    """Send requests at the same time, and return their statuses; the worker must survive them."""
    before = pids(place, "gigabytes")
    with ThreadPoolExecutor(len(amounts)) as threads:
        statuses = list(threads.map(lambda mib: ask(place, mib), amounts))
    assert pids(place, "gigabytes") == before, "the worker was replaced"
    return statuses


def too_large(place: Place) -> dict:
    statuses = together(place, [1, 1, 1, IMPOSSIBLE, 1, 1, 1])
    assert statuses == [200, 200, 200, 507, 200, 200, 200], statuses
    return {"statuses": statuses}


def free_mib() -> int:
    import torch

    return torch.cuda.mem_get_info(0)[0] >> 20


def large_batch(place: Place) -> dict:
    """Send inputs of which no two fit at once: the worker must run them one after the other."""
    each = int(0.6 * free_mib())
    statuses = together(place, [each] * 4)
    assert statuses == [200] * 4, statuses
    return {"GiB of each": each / 1024}


def occupied(place: Place) -> dict:
    """Let another process take the memory: the input is refused as long as it does."""
    amount = 8 * FREE
    together(place, [IMPOSSIBLE])  # after this, the worker keeps no freed memory
    with hog():
        small, statuses = check_sample(place.client, MNIST), together(place, [amount, 1])
        left = free_mib()
    wait_for(lambda: free_mib() > amount + FREE, 30)
    after = together(place, [amount])
    assert (statuses, after) == ([507, 200], [200]), (statuses, after)
    return {"free MiB": left, "meanwhile, mnist answered": small}


@contextmanager
def hog() -> Iterator[None]:
    """Occupy the GPU's memory but `FREE` MiB in another process while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", HOG, str(FREE)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "occupied\n", "the other process could not take the memory"
        yield
    finally:
        process.kill()
        process.wait()


def occupy(leave: int) -> None:
    """Take all memory of the first GPU but some MiB, say so, and wait to be killed."""
    import torch

    kept = []
    while (amount := (torch.cuda.mem_get_info(0)[0] >> 20) - leave) > 0:
        kept.append(torch.empty(min(amount, 4096) << 20, dtype=torch.uint8, device="cuda"))
    print("occupied", flush=True)
    time.sleep(600)
