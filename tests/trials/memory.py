"""Measure the memory of one worker of each model, beyond that of a worker without a model.

python -m tests.trials.memory cells membrane

Each model has a process of its own, in which TorchServe's worker code loads the archive and answers batches of the
model's sample. The figures are the resident memory without pages of files, such as torch's libraries, which all workers
of a server share.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bundle import mar, samples
from bundle.build.archive import archive
from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, progress
from bundle.errors import BundleError
from bundle.paths import ROOT
from tests.trials import reliability

WEIGHTS = "model.pt"  # in an archive


@dataclass(frozen=True)
class Memory:
    """The memory of one worker, in bytes.

    Attributes:
        bare: of a process that has imported what every worker imports, and has no model.
        loaded: after the model is loaded and warmed up.
        single: after batches of one request.
        full: after batches of the model's `batchSize`.
        used: then, without the freed memory that the worker keeps for its next batch.
    """

    bare: int
    loaded: int
    single: int
    full: int
    used: int


def measure(file: Path, content: bytes, headers: dict[str, str], size: int) -> Memory:
    """Measure the memory of an archive's worker, in a new process.

    Raises:
        BundleError: the process died, or the model does not answer the content.
    """
    command = [sys.executable, "-m", "tests.trials.memory_worker", str(file), str(size), json.dumps(headers)]
    run = subprocess.run(command, input=content, capture_output=True, cwd=ROOT)
    if run.returncode:
        raise BundleError(f"The worker of {file.name} did not answer its sample.", run.stderr.decode()[-2000:])
    return Memory(*json.loads(run.stdout.splitlines()[-1]))


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
    table = Table("model", "weights MB", "bare worker MB", "+ loaded", "+ batches of 1", "+ full batches", "in use")
    figures = {}
    with progress() as bars:
        folders = select(models or [])
        task = bars.add_task("models", total=len(folders), state="")
        for folder in bars.track(folders, task_id=task):
            bytes_, size, memory = measured(folder)
            figures[folder.name] = {"weights": bytes_, "batch_size": size, **vars(memory)}
            more = (memory.loaded, memory.single, memory.full, memory.used)
            cells = [bytes_ / 1e6, memory.bare / 1e6, *((each - memory.bare) / 1e6 for each in more)]
            table.add_row(folder.name, *(f"{cell:,.1f}" for cell in cells))
    console.print(table)
    if output:
        output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    reliability.run(main, "tests.trials.memory", " cells membrane molecule avdigits")
