"""Load the four models for a long time at 70 % of the machine's capacity, and check that nothing grows.

make soak MINUTES=10
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy
import psutil
import typer
from rich.table import Table

from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, progress
from bundle.errors import BundleError
from bundle.load.generator import LoadResult, closed_loop, open_loop
from bundle.server.client import check_sample
from bundle.server.process import Server
from tests.server.place import Place, new_place
from tests.shipped import SHIPPED
from tests.trials import reliability

UTILISATION = 0.7
SLICE_SECONDS = 20.0  # of load between two measurements of the processes
CONNECTIONS = 24  # per model: wrk has one thread for each
GROWTH = 0.05  # limit: growth of memory over the second half of the run
LEAK = 100  # limit: growth of open files, per hour
DRIFT = 1.5  # limit: p99 of the second half of the run, as a multiple of the first half's


@dataclass(frozen=True)
class Slice:
    """One slice of the run: its load, and the processes at its end.

    Attributes:
        hours: from the start of the run to the end of the slice.
        loads: the measured load, by model.
        memory: resident memory in MB of the "frontend" and of each model's workers.
        descriptors: number of open files and sockets of all processes.
        workers: PIDs of all workers.
    """

    hours: float
    loads: dict[str, LoadResult]
    memory: dict[str, float]
    descriptors: int
    workers: frozenset[int]


def soak(place: Place, folders: list[ModelFolder], minutes: float) -> tuple[dict[str, float], list[Slice]]:
    """Measure each model's capacity, then load all models for the given time.

    Returns:
        each model's rate in requests/s, and the slices of the run.
    """
    java = psutil.Process(Server(Path(place.environment["RUN_DIR"])).running().pid)
    inputs = {folder.name: folder.sample_file.read_bytes() for folder in folders}

    def url(name: str) -> str:
        return f"{place.client.inference}/predictions/{name}"

    rates = {}
    with progress() as bars:
        task = bars.add_task("soak", total=minutes * 60, state="measuring the capacity")
        for name, body in inputs.items():
            closed_loop(url(name), body, {}, 32, 5)  # warm-up: the JVM compiles frequently used code
            alone = closed_loop(url(name), body, {}, 32, 5).throughput
            rates[name] = UTILISATION * alone / len(inputs)
        slices: list[Slice] = []
        began = time.monotonic()
        with ThreadPoolExecutor(len(inputs)) as clients:
            while time.monotonic() - began < minutes * 60:
                runs = {
                    name: clients.submit(open_loop, url(name), body, {}, rates[name], SLICE_SECONDS, CONNECTIONS)
                    for name, body in inputs.items()
                }
                loads = {name: run.result() for name, run in runs.items()}
                slices.append(measured(place, java, folders, loads, (time.monotonic() - began) / 3600))
                failed = sum(load.failed for kept in slices for load in kept.loads.values())
                memory = sum(slices[-1].memory.values())
                bars.update(task, completed=time.monotonic() - began, state=f"{failed} failed, {memory:.0f} MB")
    return rates, slices


def measured(
    place: Place, java: psutil.Process, folders: list[ModelFolder], loads: dict[str, LoadResult], hours: float
) -> Slice:
    """Measure the processes, and return them with the load as a slice."""
    workers = {folder.name: [w["pid"] for w in place.client.describe(folder.name)["workers"]] for folder in folders}
    memory = {name: sum(map(resident, pids)) for name, pids in workers.items()}
    pids = [pid for group in workers.values() for pid in group]
    descriptors = sum(map(open_files, (java.pid, *pids)))
    return Slice(hours, loads, {"frontend": resident(java.pid), **memory}, descriptors, frozenset(pids))


def resident(pid: int) -> float:
    """Return resident memory in MB; 0 for a process that has exited (the list of workers shows that)."""
    try:
        return psutil.Process(pid).memory_info().rss / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def open_files(pid: int) -> int:
    try:
        return psutil.Process(pid).num_fds()
    except psutil.NoSuchProcess:
        return 0


def later_half(slices: list[Slice]) -> list[Slice]:
    return slices[len(slices) // 2 :]


def slope(slices: list[Slice], value: Callable[[Slice], float]) -> float:
    """Return the growth per hour, by least squares."""
    if len(slices) < 2:
        return 0.0
    return float(numpy.polyfit([kept.hours for kept in slices], [value(kept) for kept in slices], 1)[0])


def memory_slope(slices: list[Slice], part: str) -> float:
    """Return the growth of memory in MB per hour."""
    return slope(slices, lambda kept: kept.memory[part])


def p99(slices: list[Slice], model: str) -> float:
    """Return the median of the slices' p99, in seconds."""
    return statistics.median(kept.loads[model].p99 for kept in slices)


def faults(slices: list[Slice], models: list[str]) -> list[str]:
    """Return the limits that are not met, as text."""
    found = []
    if failed := sum(load.failed for kept in slices for load in kept.loads.values()):
        found.append(f"{failed} requests failed")
    if len({kept.workers for kept in slices}) > 1:
        found.append("a worker was replaced")
    late = later_half(slices)
    hours = late[-1].hours - late[0].hours
    for part in slices[0].memory:
        grown = memory_slope(late, part) * hours / late[0].memory[part]
        if grown > GROWTH:
            found.append(f"the memory of {part} grew by {grown:.1%} in the second half")
    if (leak := slope(late, lambda kept: kept.descriptors)) > LEAK:
        found.append(f"open files grew by {leak:.0f} per hour")
    for model in models:
        before, after = p99(slices[: len(slices) // 2], model), p99(late, model)
        if after > DRIFT * before:
            found.append(f"p99 of {model} rose from {1000 * before:.0f} to {1000 * after:.0f} ms")
    return found


def section(minutes: float, rates: dict[str, float], slices: list[Slice], broken: list[str]) -> str:
    """Return the section of RELIABILITY.md."""
    late = later_half(slices)
    lines = [
        "## Long run",
        "",
        f"`make soak MINUTES={minutes:g}` loads all {len(rates)} models together for {minutes:g} minutes, in slices of "
        f"{SLICE_SECONDS:g} s. Requests come at random times. Each model gets {UTILISATION:.0%} of its share of the "
        f"machine: its throughput alone, divided by {len(rates)}. {reliability.about()}",
        "",
        "| model | requests/s | answered | failed | p99 ms, first half | p99 ms, second half |",
        "|---|---|---|---|---|---|",
    ]
    for model, rate in rates.items():
        answered = sum(kept.loads[model].answered for kept in slices)
        failed = sum(kept.loads[model].failed for kept in slices)
        halves = [f"{1000 * p99(half, model):.0f}" for half in (slices[: len(slices) // 2], late)]
        lines.append(f"| {model} | {rate:.0f} | {answered} | {failed} | {' | '.join(halves)} |")
    lines += ["", "| resident memory | MB at the start | in the middle | at the end | MB/h in the second half |"]
    lines.append("|---|---|---|---|---|")
    for part in slices[0].memory:
        figures = [f"{kept.memory[part]:.0f}" for kept in (slices[0], late[0], late[-1])]
        lines.append(f"| {part} | {' | '.join(figures)} | {memory_slope(late, part):+.1f} |")
    lines += ["", f"Open files: {slices[0].descriptors} at the start, {late[-1].descriptors} at the end."]
    lines += ["", f"**Failed: {'; '.join(broken)}.**" if broken else "All limits were met."]
    return "\n".join(lines)


def main(
    minutes: Annotated[float, typer.Option(min=2, help="Length of the run.")] = 10,
    write: Annotated[bool, typer.Option("--write", help="Write the results into RELIABILITY.md.")] = False,
) -> None:
    """Start a server, load it for a long time, and measure what grows.

    The exit status is 1 if a request fails, or if memory, open files or p99 grow.
    """
    folders = select(list(SHIPPED))
    temporary = Path(tempfile.mkdtemp(prefix="soak-"))
    place = new_place(temporary / "run")
    try:
        started = place.bundle("serve", *SHIPPED)
        if started.returncode:
            raise BundleError("The server did not start.", started.stdout + started.stderr)
        rates, slices = soak(place, folders, minutes)
        for folder in folders:
            check_sample(place.client, folder)
    finally:
        place.bundle("stop")
        shutil.rmtree(temporary, ignore_errors=True)
    broken = faults(slices, [folder.name for folder in folders])
    table = Table("model", "requests/s", "failed", "p99 ms")
    for model, rate in rates.items():
        failed = sum(kept.loads[model].failed for kept in slices)
        table.add_row(model, f"{rate:.0f}", str(failed), f"{1000 * p99(later_half(slices), model):.0f}")
    console.print(table)
    for fault in broken:
        console.print(f"[red]Failed: {fault}.[/red]")
    if write:
        reliability.write_section("soak", section(minutes, rates, slices, broken))
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    reliability.run(main, "tests.trials.soak", " --minutes 240")
