"""Measure the handlers on a GPU and on the CPU of the same machine: `make bench-gpu`.

TorchServe's worker code answers whole batches of the benchmark's inputs, with one worker for each device, without
frontend and sockets. The devices take turns; the report has the medians of all turns. Each batch ends when its answers
are copied to the host, so that a time is never that of a kernel launch alone.
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
DEVICES = (CPU, "0")
SIZES = (1, 8, max(BATCHES))  # batch sizes
TURNS = 5  # turns of each device
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
    """The times of one worker at one batch size.

    Attributes:
        device: "cpu", or the number of the GPU.
        precision: the precision that the worker chose.
        batch_seconds: time of a whole batch, from bytes to JSON.
        inference_seconds: time of collation, of the copies to and from the device, and of the model.
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
    # device_count alone also counts GPUs whose driver is too old
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == CPU:
        return device
    if device.isdecimal() and int(device) < count:
        return str(int(device))
    seen = (
        f"{count}, numbered from 0."
        if count
        else "none. Check that nvidia-smi lists one and that this PyTorch is built for CUDA."
    )
    raise UsageError(f"There is no GPU {device!r}. GPUs that PyTorch sees: {seen} To measure the CPU only: DEVICES=cpu")


def measure_case(case: Case, devices: list[str], sizes: tuple[int, ...], seconds: float) -> Iterator[Timing]:
    """Measure a case on each device at each batch size; skip batches that would take longer than `LONGEST`.

    Args:
        case: the case.
        devices: "cpu" and numbers of GPUs.
        sizes: batch sizes.
        seconds: length of the measurement of each batch size on each device.

    Raises:
        BundleError: a worker does not use its device, or rejects a request.
    """
    with ExitStack() as stack:
        workers = {
            device: stack.enter_context(dry_run(case, None if device == CPU else int(device), max(sizes)))
            for device in devices
        }
        for device, worker in workers.items():
            if str(worker.handler.device) != (CPU if device == CPU else f"cuda:{device}"):
                raise BundleError(
                    f"The worker of {case.model} uses the device {worker.handler.device} instead of {name(device)}."
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
                batch, infer = (statistics.median(turn[device][part] for turn in turns) for part in (0, 1))
                timing = Timing(case.name, device, worker.handler.precision, size, batch, infer)
                rates[device] = timing.rate
                yield timing


def settle(worker: DryRun, case: Case, size: int) -> None:
    """Run the first batches, during which TorchScript compiles.

    Raises:
        BundleError: an answer has another status than 200.
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
    """Return the median time of a batch in seconds, measured for `seconds` and at least once."""
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
    """Make the folder of the report, and check that the report can be written.

    Raises:
        UsageError: the file cannot be written, or is not a report of this command.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        held = output.read_text() if output.exists() else ""  # empty after a run that ended before its first timing
        if held and not held.startswith(TITLE):
            raise UsageError(f"{output} is not a report of this command and was not changed. Name another file.")
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
        tuple | None,
        typer.Option(
            parser=comma_list(str, "devices"),
            metavar="DEVICE,...",
            help=f"cpu and numbers of GPUs: cpu,0,1. By default, {','.join(DEVICES)}.",
        ),
    ] = None,
    cases: Cases = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of the measurement of each batch size on each device.")
    ] = 4,
    output: Annotated[Path, typer.Option("--output", "-o", help="The Markdown file to write.")] = OUTPUT,
) -> None:
    wanted_devices = list(dict.fromkeys(known(device) for device in devices or DEVICES))
    wanted_cases = chosen(cases, CASES, "case")
    writable(output)
    timings: list[Timing] = []
    try:
        for case in track(wanted_cases, "measuring", console=errors):
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
                for timing in measure_case(case, wanted_devices, SIZES, seconds):
                    timings.append(timing)
    except KeyboardInterrupt:
        note("Interrupted. The report has what was measured until then.")
        raise
    except SystemExit as exc:  # a worker exits if its device fails
        raise RuntimeError(f"A worker ended: {exc}") from exc
    finally:
        if timings:
            report(timings, wanted_devices, output)


if __name__ == "__main__":
    terminal.run(app, "python -m loadtest.bench.devices")
