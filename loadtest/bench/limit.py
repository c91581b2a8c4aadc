"""What this machine can do without a server: the most requests a second that a plain loop answers.

`python -m loadtest.bench.limit CASE` prints one line of JSON. Two loops: the reference pipeline, which is what the
peers run, and the bundle's own handler out of its archive, run by TorchServe's worker code.
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
SECONDS = 0.5  # a batch size is tried for so long
SETTLED = 3  # runs before it counts: TorchScript specialises in the first ones
LONGEST = 1.5  # seconds of a batch that is still tried
STORE = WORK / "store"

Loop = Callable[[int], Callable[[], object]]  # batch size -> what answers one batch


def pipeline_loop(case: Case, threads: int) -> Loop:
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline(case.name, threads)
    return lambda batch: lambda: pipeline.predict([pipeline.decode(case.body) for _ in range(batch)])


def handler_loop(case: Case, threads: int) -> Loop:
    """The handler with the archive's model, and TorchServe's own code around it as in a worker, sockets excepted."""
    import torch

    handler = dry_run(case)
    torch.set_num_threads(threads)
    return lambda batch: lambda: handler.service.predict(requests(case, batch))


def dry_run(case: Case, gpu: int | None = None) -> DryRun:
    """A worker of the case's model, on the CPU or on the GPU of this number."""
    return DryRun(archived(case), batch_size=max(BATCHES), gpu=gpu)


def archived(case: Case) -> Path:
    """The archive of the case's model; it is made the first time."""
    if case.model == resnet.NAME:
        resnet.make()
    return archive(ModelFolder(case.folder), STORE).path


def content(case: Case) -> bytes | str:
    """The input as TorchServe hands it to a handler: text as text."""
    return case.body.decode() if case.content_type.startswith("text/") else case.body


def requests(case: Case, size: int) -> list[dict]:
    """A batch, as a worker reads it off its socket."""
    row = {"body": content(case)}
    return [request(index, row, {"Content-Type": case.content_type}) for index in range(size)]


LOOPS = {"pipeline": pipeline_loop, "handler": handler_loop}


def worker(pipe: Connection, kind: str, case: str, threads: int) -> None:
    """Says when it is ready; then for each (batch size, time of the start): answers, and how long they took."""
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
    """The best batch size of so many processes with so many threads each."""
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
    """The reference pipeline's answer: its first class and that one's probability."""
    from loadtest.bench.pipeline import Pipeline

    pipeline = Pipeline(case, threads=1)
    [answer] = pipeline.predict([pipeline.decode(CASES[case].body)])
    return first(json.dumps(answer).encode())


def main(case: str) -> None:
    archived(CASES[case])  # once, before several processes look for it
    measured = {kind: asdict(limit) for kind, limit in limits(case).items()}
    print(json.dumps({"expected": reference(case), "limits": measured}))


if __name__ == "__main__":
    main(sys.argv[1])
