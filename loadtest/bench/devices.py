"""What the handlers do on a GPU, beside the CPU of the same machine: `make bench-gpu`.

Whole batches of the benchmark's inputs through TorchServe's worker code, one worker a device, without frontend and
sockets; the devices in turns, medians of all turns. Every batch ends with the copy of its answers to the host, so a
time is never that of a launch alone.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from rich.table import Table

from bundle import machine
from bundle.build.dryrun import DryRun
from bundle.cli import console as terminal
from bundle.cli.console import console, errors, note
from bundle.cli.parameters import comma_list
from bundle.errors import BundleError, UsageError
from loadtest.bench.__main__ import Cases, chosen
from loadtest.bench.cases import CASES, Case
from loadtest.bench.limit import BATCHES, LONGEST, SETTLED, content, dry_run, requests
from loadtest.bench.paths import WORK
from loadtest.bench.report import markdown_table, number

CPU = "cpu"
SIZES = (1, 8, max(BATCHES))  # of batches
TURNS = 5
OUTPUT = WORK / "gpu.md"
TITLE = "# Devices"
METHOD = (
    "One worker a device, whole batches through TorchServe's worker code, the devices in turns; medians. The CPU's "
    "worker has the threads of its model's settings (one, as shipped): *× CPU* is not the whole processor."
)
HEADER = ("case", "batch", "device", "precision", "req/s", "× CPU", "batch ms", "inference")

app = terminal.program()


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
    """Return the device's name without leading zeros.

    Raises:
        UsageError: PyTorch cannot use it.
    """
    # without the first, this counts GPUs that the driver is too old for
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == CPU:
        return device
    if device.isdecimal() and int(device) < count:
        return str(int(device))
    seen = (
        f"{count}, numbered from 0." if count else "none: does nvidia-smi list one, and is this PyTorch built for CUDA?"
    )
    raise UsageError(f"There is no GPU {device!r} here. PyTorch sees {seen} DEVICES=cpu measures the CPU alone.")


def measure_case(case: Case, devices: list[str], sizes: tuple[int, ...], seconds: float) -> Iterator[Timing]:
    """Batches that would take a device longer than `LONGEST` are left out.

    Args:
        seconds: of each batch size on each device.

    Raises:
        BundleError: a worker does not compute on its device, or does not answer every request.
    """
    with ExitStack() as stack:
        workers = {
            device: stack.enter_context(dry_run(case, None if device == CPU else int(device))) for device in devices
        }
        for device, worker in workers.items():
            if str(worker.handler.device) != (CPU if device == CPU else f"cuda:{device}"):
                raise BundleError(
                    f"The worker of {case.model} computes on {worker.handler.device}, not on {name(device)}."
                )
        rates: dict[str, float] = {}
        for size in sizes:
            able = {d: w for d, w in workers.items() if d not in rates or size / rates[d] <= LONGEST}
            for worker in able.values():
                settle(worker, case, size)
            turns = [
                {d: (whole(w, case, size, seconds), inference(w, case, size, seconds)) for d, w in able.items()}
                for _ in range(TURNS)
            ]
            for device, worker in able.items():
                medians = map(statistics.median, zip(*(turn[device] for turn in turns), strict=True))
                timing = Timing(case.name, device, worker.handler.precision, size, *medians)
                rates[device] = timing.rate
                yield timing


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
    samples = worker.decode({"body": content(case)}) * size
    return timed(lambda: worker.handler.predict(samples), seconds / TURNS / 2)


def timed(batch: Callable[[], object], seconds: float) -> float:
    """Seconds of one, by the median of those that go into so many seconds."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        batch()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def name(device: str) -> str:
    return device if device == CPU else f"GPU {device}"


def rows(timings: list[Timing]) -> list[tuple[str, ...]]:
    on_cpu = {(each.case, each.batch): each for each in timings if each.device == CPU}
    return [
        (
            each.case,
            str(each.batch),
            name(each.device),
            each.precision,
            number(each.rate),
            f"{each.rate / cpu.rate:.2f}" if (cpu := on_cpu.get((each.case, each.batch))) else "",
            f"{1000 * each.batch_seconds:.2f}",
            f"{each.inference_seconds / each.batch_seconds:.0%}",
        )
        for each in timings
    ]


def writable(output: Path) -> None:
    """Makes the folder of the report.

    Raises:
        BundleError: it cannot be written there, or something else would be lost.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        held = output.read_text() if output.exists() else ""  # "": a run that ended before its first timing
        if held and not held.startswith(TITLE):
            raise UsageError(f"{output} is not a report of this command, and is left as it is. Name another file.")
        output.touch()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{output} cannot be written: {exc}") from exc


def report(timings: list[Timing], devices: list[str], output: Path) -> None:
    table = Table(*HEADER)
    for row in rows(timings):
        table.add_row(*row)
    console.print(table)
    gpus = {name(device): torch.cuda.get_device_name(int(device)) for device in devices if device != CPU}
    about = "\n".join(f"- {key}: {value}" for key, value in {**machine.about(), **gpus}.items())
    output.write_text(f"{TITLE}\n\n{METHOD}\n\n{about}\n\n{markdown_table(HEADER, rows(timings))}\n")
    console.print(f"Written: {output}", soft_wrap=True)


@app.command(
    help=__doc__,
    epilog="Examples: `python -m loadtest.bench.devices` · `python -m loadtest.bench.devices --devices cpu,0,1 --cases"
    " mnist,photo` · `python -m loadtest.bench.devices --devices cpu`",
)
def main(
    devices: Annotated[
        tuple,
        typer.Option(parser=comma_list(str, "devices"), metavar="DEVICE,...", help="cpu, and numbers of GPUs: cpu,0,1"),
    ] = f"{CPU},0",
    cases: Cases = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each batch size on each device.")] = 4,
    output: Annotated[Path, typer.Option("--output", "-o", help="The Markdown file to write.")] = OUTPUT,
) -> None:
    asked = list(dict.fromkeys(known(device) for device in devices))
    wanted = chosen(cases, CASES, "case")
    writable(output)
    timings: list[Timing] = []
    try:
        for case in track(wanted, "measuring", console=errors):
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
                for timing in measure_case(case, asked, SIZES, seconds):
                    timings.append(timing)
    except KeyboardInterrupt:
        note("Interrupted: this is what was measured until then.")
        raise
    except SystemExit as exc:  # of a worker that its device fails
        raise RuntimeError(f"A worker ended: {exc}") from exc
    finally:
        if timings:
            report(timings, asked, output)


if __name__ == "__main__":
    terminal.run(app, "python -m loadtest.bench.devices")
