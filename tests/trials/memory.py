"""Measure the memory of one worker of each model, beyond that of a worker without a model.

python -m tests.trials.memory cells membrane

Each model has a process of its own, in which TorchServe's worker code loads the archive and answers batches of the
model's sample. The figures are the resident memory without pages of files, such as torch's libraries, which all workers
of a server share.
"""

import json
import multiprocessing
import os
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.table import Table

from bundle import mar, samples
from bundle.build.archive import archive
from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, progress
from bundle.errors import BundleError
from tests.trials import reliability

BATCHES = 5  # of each size: the first ones compile
WEIGHTS = "model.pt"  # in an archive


@dataclass(frozen=True)
class Memory:
    """The memory of one worker, in bytes.

    Attributes:
        bare: of a process that has imported what every worker imports, and has no model.
        loaded: after the model is loaded and warmed up.
        single: after batches of one request.
        full: after batches of the model's `batchSize`.
    """

    bare: int
    loaded: int
    single: int
    full: int


def measure(file: Path, content: bytes, headers: dict[str, str], size: int) -> Memory:
    """Measure the memory of an archive's worker, in a new process.

    Raises:
        BundleError: the process died, or the model does not answer the content.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, file, content, headers, size))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise BundleError(f"The worker of {file.name} died.") from None
    finally:
        process.join()
    if isinstance(found, str):
        raise BundleError(f"The worker of {file.name} did not answer its sample.", found)
    return found


def work(pipe: Connection, file: Path, content: bytes, headers: dict[str, str], size: int) -> None:
    """Be the worker: send its `Memory`, or the answer to a request that failed, as text."""
    import ts.model_service_worker  # noqa: F401  # what a real worker imports before its handler

    from bundle.build.dryrun import DryRun

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
        bare = resident()
        with DryRun(file) as worker:
            found = [bare, resident()]
            for requests in (1, size):
                for _ in range(BATCHES):
                    for status, body in worker.predict([{"body": content}] * requests, [headers] * requests):
                        if status != 200:
                            pipe.send(f"{status} {body}")
                            return
                found.append(resident())
    pipe.send(Memory(*found))


def resident() -> int:
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def weights(file: Path) -> int:
    """Return the bytes of the weights in an archive's module."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / WEIGHTS
        module.write_bytes(mar.read(file, WEIGHTS))
        loaded = torch.jit.load(module)
    return sum(each.numel() * each.element_size() for each in (*loaded.parameters(), *loaded.buffers()))


def measured(folder: ModelFolder) -> tuple[int, int, Memory]:
    """Return the bytes of the model's weights, its `batchSize`, and its worker's memory."""
    if folder.sample_file is None:
        raise BundleError(f"{folder.name} has no sample.")
    with tempfile.TemporaryDirectory() as store:
        file = archive(folder, store=Path(store)).path
        size = mar.config(file).get("batchSize", 1)
        memory = measure(file, folder.sample_file.read_bytes(), samples.headers(folder.sample_file), size)
        return weights(file), size, memory


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Names of models. Default: those served always.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures, in bytes, as JSON.")] = None,
) -> None:
    """Measure the memory of one worker of each model."""
    table = Table("model", "weights MB", "bare worker MB", "+ loaded", "+ batches of 1", "+ full batches", "batch size")
    figures = {}
    with progress() as bars:
        folders = select(models or [])
        task = bars.add_task("models", total=len(folders), state="")
        for folder in bars.track(folders, task_id=task):
            bytes_, size, memory = measured(folder)
            figures[folder.name] = {"weights": bytes_, "batch_size": size, **vars(memory)}
            more = (memory.loaded, memory.single, memory.full)
            cells = [bytes_ / 1e6, memory.bare / 1e6, *((each - memory.bare) / 1e6 for each in more)]
            table.add_row(folder.name, *(f"{cell:,.1f}" for cell in cells), str(size))
    console.print(table)
    if output:
        output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    reliability.run(main, "tests.trials.memory", " cells membrane molecule avdigits")
