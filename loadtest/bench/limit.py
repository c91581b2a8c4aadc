"""The in-process limit: the highest rate of requests that a loop without a server answers on this machine.

`python -m loadtest.bench.limit CASE` prints one line of JSON. It measures two loops: the reference pipeline, which the
peers run, and the bundle's handler from its archive, run by TorchServe's worker code.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun, request
from bundle.catalog import ModelFolder
from loadtest.bench import resnet
from loadtest.bench.cases import CASES, Case
from loadtest.bench.paths import WORK
from loadtest.bench.results import Limit
from loadtest.bench.systems.base import first

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = 0.5  # length of the measurement of a batch size
SETTLED = 3  # batches before the measurement: TorchScript compiles during the first ones
LONGEST = 1.5  # seconds; batch sizes that take longer are left out
STORE = WORK / "store"

Loop = Callable[[int], Callable[[], object]]  # batch size -> function that answers one batch


def pipeline_loop(case: Case, threads: int) -> Loop:
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline(case.name, threads)
    return lambda batch: lambda: pipeline.predict([pipeline.decode(case.body) for _ in range(batch)])


def handler_loop(case: Case, threads: int) -> Loop:
    """Return the loop of the handler in TorchServe's worker code, without sockets."""
    import torch

    handler = dry_run(case)
    torch.set_num_threads(threads)
    return lambda batch: lambda: handler.service.predict(requests(case, batch))


def dry_run(case: Case, gpu: int | None = None, batch_size: int = max(BATCHES)) -> DryRun:
    """Return a worker of the case's model, on the CPU or on the GPU with this number."""
    return DryRun(archived(case), batch_size, gpu)


def archived(case: Case) -> Path:
    """Return the archive of the case's model, which is built the first time."""
    if case.model == resnet.NAME:
        resnet.make()
    return archive(ModelFolder(case.folder), STORE).path


def content(case: Case) -> object:
    """Return the input as TorchServe passes it to a handler: text as str, JSON parsed, everything else as bytes."""
    if case.content_type == "application/json":
        return json.loads(case.body)
    return case.body.decode() if case.content_type.startswith("text/") else case.body


def requests(case: Case, size: int) -> list[dict]:
    """Return a batch of requests, as a worker reads it from its socket."""
    row = {"body": content(case)}
    return [request(index, row, {"Content-Type": case.content_type}) for index in range(size)]


LOOPS = {"pipeline": pipeline_loop, "handler": handler_loop}


def worker(pipe: Connection, kind: str, case: str, threads: int) -> None:
    """Measure the rate of a loop in a process of its own.

    It sends "ready", then for each batch size received: "settled", and after a start time received, requests a second.
    """
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
        loop = LOOPS[kind](CASES[case], threads)
        pipe.send("ready")
        while True:
            try:
                batch = pipe.recv()
            except EOFError:
                return
            answer = loop(batch)
            for _ in range(SETTLED):
                answer()
            pipe.send("settled")
            time.sleep(max(0, pipe.recv() - time.monotonic()))
            begin, answered = time.monotonic(), 0
            while time.monotonic() - begin < SECONDS:
                answer()
                answered += batch
            pipe.send(answered / (time.monotonic() - begin))


def find_limit(kind: str, case: str, processes: int, threads: int) -> Limit:
    """Return the limit at the best batch size, for this number of processes and of threads in each."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, kind, case, threads), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    best = Limit(0, 1, processes, threads)
    for batch in BATCHES:
        if best.rate and batch * processes / best.rate > LONGEST:
            break
        for pipe in pipes:
            pipe.send(batch)
        for pipe in pipes:
            pipe.recv()
        start = time.monotonic() + 0.05
        for pipe in pipes:
            pipe.send(start)
        rate = sum(pipe.recv() for pipe in pipes)
        best = max(best, Limit(rate, batch, processes, threads), key=lambda limit: limit.rate)
    return best


def limits(case: str) -> dict[str, Limit]:
    cores = len(os.sched_getaffinity(0))
    splits = {(cores, 1), (1, cores)}
    return {
        kind: max((find_limit(kind, case, *split) for split in splits), key=lambda limit: limit.rate) for kind in LOOPS
    }


def reference(case: str) -> tuple[int, float]:
    """Return the first class of the reference pipeline's answer, and its probability."""
    from loadtest.bench import pipeline

    return first(json.dumps(pipeline.reference(case)).encode())


def main(case: str) -> None:
    archived(CASES[case])  # once, before several processes need it
    measured = {kind: asdict(limit) for kind, limit in limits(case).items()}
    print(json.dumps({"expected": reference(case), "limits": measured}))


if __name__ == "__main__":
    main(sys.argv[1])
