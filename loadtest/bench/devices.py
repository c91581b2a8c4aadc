"""What the handlers do on a GPU, beside the CPU of the same machine: `make bench-gpu`.

Whole batches of the benchmark's inputs through TorchServe's worker code, one worker a device, without frontend and
sockets; the devices in turns, medians of all turns. Every batch ends with the copy of its answers to the host, so a
time is never that of a launch alone.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bundle.dryrun import DryRun
from bundle.errors import BundleError
from loadtest.bench.__main__ import chosen, words
from loadtest.bench.cases import CASES, WORK, Case
from loadtest.bench.limit import BATCHES, LONGEST, SETTLED, content, dry_run, requests
from loadtest.bench.report import markdown_table, number
from loadtest.bench.results import about_this_machine

CPU = "cpu"
SIZES = (1, 8, max(BATCHES))  # of batches
TURNS = 5
OUTPUT = WORK / "gpu.md"
HEADER = ("case", "batch", "device", "precision", "req/s", "× CPU", "batch ms", "inference")

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Timing:
    """One worker with batches of one size.

    Attributes:
        device: "cpu", or the number of the GPU.
        precision: what the worker chose to compute in.
        batch_seconds: of a whole batch, from bytes to JSON.
        inference_seconds: of its collation, the copies to and from the device and the model between them.
    """

    case: str
    device: str
    precision: str
    batch: int
    batch_seconds: float
    inference_seconds: float

    @property
    def rate(self) -> float:
        return self.batch / self.batch_seconds


def known(device: str) -> str:
    """
    Raises:
        BundleError: PyTorch sees no such device.
    """
    count = torch.cuda.device_count()
    if device == CPU or (device.isdecimal() and int(device) < count):
        return device
    seen = (
        f"{count}, numbered from 0." if count else "none: does nvidia-smi list one, and is this PyTorch built for CUDA?"
    )
    raise BundleError(f"There is no GPU {device!r} here. PyTorch sees {seen} DEVICES=cpu measures the CPU alone.")


def measure_case(case: Case, devices: list[str], sizes: tuple[int, ...], seconds: float) -> list[Timing]:
    """Batches that would take a device longer than the benchmark's limits do are left out.

    Args:
        seconds: of each batch size on each device.

    Raises:
        BundleError: a worker does not answer every request.
    """
    with ExitStack() as stack:
        workers = {d: stack.enter_context(dry_run(case, None if d == CPU else int(d))) for d in devices}
        timings: list[Timing] = []
        for size in sizes:
            if any(size / timing.rate > LONGEST for timing in timings):
                break
            for worker in workers.values():
                settle(worker, case, size)
            turns = [
                {d: (whole(w, case, size, seconds), inference(w, case, size, seconds)) for d, w in workers.items()}
                for _ in range(TURNS)
            ]
            for device, worker in workers.items():
                medians = map(statistics.median, zip(*(turn[device] for turn in turns), strict=True))
                timings.append(Timing(case.name, device, worker.handler.precision, size, *medians))
        return timings


def settle(worker: DryRun, case: Case, size: int) -> None:
    """Lets TorchScript specialise.

    Raises:
        BundleError: a request is not answered 200.
    """
    for _ in range(SETTLED):
        statuses = {status for status, _ in worker.predict([{"body": content(case)}] * size)}
        if statuses != {200}:
            raise BundleError(f"The handler of {case.model} answers {case.name} with {sorted(statuses)}.")


def whole(worker: DryRun, case: Case, size: int, seconds: float) -> float:
    return timed(lambda: worker.service.predict(requests(case, size)), seconds / TURNS / 2)


def inference(worker: DryRun, case: Case, size: int, seconds: float) -> float:
    handler = worker.handler
    samples = [handler.decode(content(case))] * size
    return timed(lambda: handler.inference(samples, handler.settings.top_k), seconds / TURNS / 2)


def timed(batch: Callable[[], object], seconds: float) -> float:
    """Seconds of one, by the median of those that go into so many seconds."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        batch()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rows(timings: list[Timing]) -> list[tuple[str, ...]]:
    on_cpu = {(each.case, each.batch): each for each in timings if each.device == CPU}
    return [
        (
            each.case,
            str(each.batch),
            each.device if each.device == CPU else f"GPU {each.device}",
            each.precision,
            number(each.rate),
            f"{each.rate / cpu.rate:.2f}" if (cpu := on_cpu.get((each.case, each.batch))) else "",
            f"{1000 * each.batch_seconds:.2f}",
            f"{each.inference_seconds / each.batch_seconds:.0%}",
        )
        for each in timings
    ]


def about(devices: list[str]) -> dict[str, str]:
    gpus = {f"GPU {d}": torch.cuda.get_device_name(int(d)) for d in devices if d != CPU}
    return {**about_this_machine(), **gpus}


@app.command(
    help=__doc__,
    epilog="Examples: `python -m loadtest.bench.devices` · `python -m loadtest.bench.devices --devices cpu,0,1 --cases"
    " mnist,photo` · `python -m loadtest.bench.devices --devices cpu`",
)
def main(
    devices: Annotated[str, typer.Option(help="cpu and numbers of GPUs, separated by commas.")] = f"{CPU},0",
    cases: Annotated[str, typer.Option(help=f"Which, separated by commas: {', '.join(CASES)}; by default all.")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each batch size on each device.")] = 4,
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")] = OUTPUT,
) -> None:
    try:
        asked = [known(device) for device in dict.fromkeys(words(devices))]
        if not asked:
            raise BundleError("Say which devices: --devices cpu,0")
        timings: list[Timing] = []
        for case in track(chosen(cases, CASES, "case"), "measuring", console=errors):
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
                timings += measure_case(case, asked, SIZES, seconds)
    except BundleError as exc:
        errors.print(f"error: {exc}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from exc
    except KeyboardInterrupt:
        errors.print("Interrupted: nothing is written.")
        raise typer.Exit(130) from None
    table = Table(*HEADER)
    for row in rows(timings):
        table.add_row(*row)
    console.print(table)
    lines = [f"- {key}: {value}" for key, value in about(asked).items()]
    text = f"# Devices\n\n{__doc__.splitlines()[0]}\n\n" + "\n".join(lines)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"{text}\n\n{markdown_table(HEADER, rows(timings))}\n")
    console.print(f"Written: {output}", soft_wrap=True)


if __name__ == "__main__":
    app()
