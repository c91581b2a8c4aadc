"""Check everything that needs a GPU, on a real one: `make gpu-check`.

It takes at most eight minutes. Every result is written at once; a run that ended early continues when it is started
again, with what has not passed yet. With `cpu` in place of a GPU, the checks themselves are tried.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bundle import machine
from bundle.cli import console as terminal
from bundle.cli.console import console
from loadtest.bench.devices import CPU, known
from tests.trials.gpu.runner import Step, run_steps
from tests.trials.gpu.steps import REHEARSAL, STEPS, WORK, open_record

app = terminal.program()


@app.command(
    help=__doc__,
    epilog="Examples: `python -m tests.trials.gpu` · `python -m tests.trials.gpu --devices cpu --minutes 20` ·"
    " `python -m tests.trials.gpu --steps server --again`",
)
def main(
    devices: Annotated[str, typer.Option(help="The number of the GPU; or cpu, to try the checks without one.")] = "0",
    steps: Annotated[str, typer.Option(help="The steps to run, with commas between them.")] = ",".join(STEPS),
    minutes: Annotated[float, typer.Option(min=0.1, help="For all steps together.")] = 8,
    again: Annotated[bool, typer.Option("--again", help="Run everything, also what has passed before.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of results and reports.")] = WORK,
) -> None:
    device = known(devices)
    wanted = [name.strip() for name in steps.split(",")]
    if unknown := [name for name in wanted if name not in STEPS]:
        raise typer.BadParameter(f"there is no step {unknown[0]!r}; there are: {', '.join(STEPS)}.")
    folder = output.resolve() / ("cpu" if device == CPU else f"gpu-{device}")
    record = open_record(folder, [] if device == CPU else [machine.gpus()[int(device)]])
    if again:
        record.clear()
    # a step has one GPU, which is its first: TorchServe would give its workers all of them in turns
    rehearsal = {REHEARSAL: "1", "CUDA_VISIBLE_DEVICES": "", "TS_NUMBER_OF_GPU": "0"}
    only = rehearsal if device == CPU else {"CUDA_VISIBLE_DEVICES": visible(device), "TS_NUMBER_OF_GPU": "1"}
    command = (sys.executable, "-m", "tests.trials.gpu.steps")
    planned = [Step(name, each.title, (*command, name, str(folder)), each.limit) for name, each in STEPS.items()]
    planned = [step for step in planned if step.name in wanted]
    passed = run_steps(planned, record, 60 * minutes, {"PYTHONUNBUFFERED": "1", **only})
    console.print(f"Written: {os.path.relpath(folder)}/report.md, {record.file.name}", soft_wrap=True)
    if not passed:
        raise typer.Exit(1)


def visible(device: str) -> str:
    """Return the system's number of a GPU, which is another than PyTorch's if some are hidden."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return shown.split(",")[int(device)] if shown else device


if __name__ == "__main__":
    terminal.run(app, "python -m tests.trials.gpu")
