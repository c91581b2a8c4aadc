"""A long run: the four models under mixed load at 70 % of what the machine carries, and whether anything grows.

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
from tests.server.conftest import SHIPPED, Place, new_place
from tests.trials import reliability

UTILISATION = 0.7
SLICE_SECONDS = 20.0  # of load between two looks at the processes
CONNECTIONS = 24  # of each model's clients: wrk has a thread for each
GROWTH = 0.05  # of memory, in the last half of the run
LEAK = 100  # open files an hour
DRIFT = 1.5  # of p99, from the first half of the slices to the last


@dataclass(frozen=True)
class Slice:
    """Some seconds of load, and the processes at their end.

    Attributes:
        hours: since the first slice began.
        loads: by model.
        memory: resident, in MB: "frontend" and each model's workers.
        descriptors: open files and sockets of all processes.
        workers: the pids of all workers.
    """

    hours: float
    loads: dict[str, LoadResult]
    memory: dict[str, float]
    descriptors: int
    workers: frozenset[int]


def soak(place: Place, folders: list[ModelFolder], minutes: float) -> tuple[dict[str, float], list[Slice]]:
    """The rates (requests/s) of the models, and what was seen."""
    java = psutil.Process(Server(Path(place.environment["RUN_DIR"])).running().pid)
    inputs = {folder.name: folder.sample_file.read_bytes() for folder in folders}

    def url(name: str) -> str:
        return f"{place.client.inference}/predictions/{name}"

    rates = {}
    with progress() as bars:
        task = bars.add_task("soak", total=minutes * 60, state="how much the machine carries")
        for name, body in inputs.items():
            closed_loop(url(name), body, {}, 32, 5)  # Java compiles what it runs often
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
                slices.append(look(place, java, folders, loads, (time.monotonic() - began) / 3600))
                failed = sum(load.failed for kept in slices for load in kept.loads.values())
                memory = sum(slices[-1].memory.values())
                bars.update(task, completed=time.monotonic() - began, state=f"{failed} failed, {memory:.0f} MB")
    return rates, slices


def look(
    place: Place, java: psutil.Process, folders: list[ModelFolder], loads: dict[str, LoadResult], hours: float
) -> Slice:
    workers = {folder.name: [w["pid"] for w in place.client.describe(folder.name)["workers"]] for folder in folders}
    memory = {name: sum(map(resident, pids)) for name, pids in workers.items()}
    pids = [pid for group in workers.values() for pid in group]
    descriptors = sum(map(open_files, (java.pid, *pids)))
    return Slice(hours, loads, {"frontend": resident(java.pid), **memory}, descriptors, frozenset(pids))


def resident(pid: int) -> float:
    """MB; none of a process that has ended, which the list of workers shows."""
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
    """How much it grows in an hour, by least squares."""
    if len(slices) < 2:
        return 0.0
    return float(numpy.polyfit([kept.hours for kept in slices], [value(kept) for kept in slices], 1)[0])


def memory_slope(slices: list[Slice], part: str) -> float:
    """MB an hour."""
    return slope(slices, lambda kept: kept.memory[part])


def p99(slices: list[Slice], model: str) -> float:
    """The median of the slices' p99, in seconds."""
    return statistics.median(kept.loads[model].p99 for kept in slices)


def faults(slices: list[Slice], models: list[str]) -> list[str]:
    """What does not hold."""
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
            found.append(f"the memory of {part} grew by {grown:.1%} in the last half")
    if (leak := slope(late, lambda kept: kept.descriptors)) > LEAK:
        found.append(f"open files grew by {leak:.0f} an hour")
    for model in models:
        before, after = p99(slices[: len(slices) // 2], model), p99(late, model)
        if after > DRIFT * before:
            found.append(f"p99 of {model} went from {1000 * before:.0f} to {1000 * after:.0f} ms")
    return found


def section(minutes: float, rates: dict[str, float], slices: list[Slice], broken: list[str]) -> str:
    late = later_half(slices)
    lines = [
        "## Long run",
        "",
        f"`make soak MINUTES={minutes:g}`: each model gets {UTILISATION:.0%} of a quarter of what it answers alone, at "
        f"random times, for {minutes:g} minutes in slices of {SLICE_SECONDS:g} s. {reliability.about()}",
        "",
        "| model | requests/s | answered | failed | p99 ms, first half | last half |",
        "|---|---|---|---|---|---|",
    ]
    for model, rate in rates.items():
        answered = sum(kept.loads[model].answered for kept in slices)
        failed = sum(kept.loads[model].failed for kept in slices)
        halves = [f"{1000 * p99(half, model):.0f}" for half in (slices[: len(slices) // 2], late)]
        lines.append(f"| {model} | {rate:.0f} | {answered} | {failed} | {' | '.join(halves)} |")
    lines += ["", "| resident memory | MB at the start | in the middle | at the end | MB/h in the last half |"]
    lines.append("|---|---|---|---|---|")
    for part in slices[0].memory:
        figures = [f"{kept.memory[part]:.0f}" for kept in (slices[0], late[0], late[-1])]
        lines.append(f"| {part} | {' | '.join(figures)} | {memory_slope(late, part):+.1f} |")
    lines += ["", f"Open files: {slices[0].descriptors} at the start, {late[-1].descriptors} at the end."]
    lines.append(f"**It does not hold: {'; '.join(broken)}.**" if broken else "All of it holds.")
    return "\n".join(lines)


def main(
    minutes: Annotated[float, typer.Option(min=2, help="How long.")] = 10,
    write: Annotated[bool, typer.Option("--write", help="Write the figures into RELIABILITY.md.")] = False,
) -> None:
    """Load a server of its own for a long time. Exits 1 where a request fails, or memory, open files or p99 grow."""
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
        console.print(f"[red]It does not hold: {fault}.[/red]")
    if write:
        reliability.write_section("soak", section(minutes, rates, slices, broken))
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    reliability.run(main, "tests.trials.soak", " --minutes 240")
