"""Check the capacity model against one and two replicas on this machine.

python -m tests.trials.capacity image=150ms cells=300ms

Each replica is a TorchServe with one worker of one thread, and all of its processes are pinned to one core. The model
knows what `bundle capacity` measures of the first replica. Then requests come at random times to the first replica and,
through nginx with `least_conn`, to both: what is the p99 at 50 % and 70 % of the capacity, and up to which rate do they
keep the target?
"""

import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from bundle.build.archive import archive
from bundle.capacity.figures import Figures, Identity
from bundle.capacity.measurement import measured, warm_up
from bundle.capacity.queueing import Latency, Replica, latency
from bundle.catalog import ModelFolder, select
from bundle.cli.capacity import check_idle
from bundle.cli.console import note, progress
from bundle.durations import seconds as parse
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.load.generator import LoadResult, open_loop
from bundle.paths import ROOT
from bundle.server.ports import free_ports
from bundle.server.process import Server
from bundle.tuning.chart import AMBER, GREEN, RED, STYLE
from bundle.tuning.trial_server import Service, TrialServer
from bundle.tuning.tuner import read_inputs
from loadtest.bench.inputs import generated
from loadtest.bench.usage import Meter
from tests.support import wait_for
from tests.trials import reliability

DOCUMENT = ROOT / "docs" / "capacity.md"
PICTURE = DOCUMENT.with_suffix(".svg")
CORES = (0, 1)  # of the replicas
SHARES = (0.5, 0.7)  # of the capacity
CONNECTIONS = 256
LOWEST, HIGHEST = 0.7, 1.3  # of the model's highest rate: where the measured one is looked for
STEPS = 3  # of that search: the interval becomes eight times smaller
WARM_UP_SECONDS = 5.0  # at a load of 70 %, before anything counts
# what is sent instead of the sample: a photograph of 720 x 720 pixels, so that the load generator and nginx need little
SENT = {"image": "photo.jpg"}
CURVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95)  # of the capacity
PROXY = """
daemon off;
pid {folder}/pid;
error_log stderr crit;
worker_processes 1;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    client_body_buffer_size 16m;
    client_max_body_size 16m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    upstream replicas {{
        least_conn;
        {servers}
        keepalive 256;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream off;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Result:
    """What one model's replicas did, and what the capacity model says.

    Attributes:
        replicas: their number.
        loads: for each share of the capacity, what was measured, and what the model says.
        measured: every rate (requests/s) and p99 (s) that was measured.
        rate: the highest measured rate that keeps the target, in requests/s.
        said: the model's highest rate.
    """

    model: str
    target: float
    replicas: int
    loads: dict[float, tuple[LoadResult, Latency]]
    measured: list[tuple[float, float]]
    rate: float
    said: float


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Pin this process, and the processes that it starts in the block, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def proxy(upstreams: list[str], folder: Path) -> Iterator[tuple[str, int]]:
    """Run nginx in front of servers (host:port), and yield its URL and its process id."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise BundleError("nginx is missing. Install it: apt-get install nginx-light")
    [port] = free_ports(1)
    folder.mkdir()
    servers = "\n        ".join(f"server {each};" for each in upstreams)
    file = folder / "nginx.conf"
    file.write_text(PROXY.format(folder=folder, port=port, servers=servers))
    run = subprocess.Popen([program, "-p", str(folder), "-c", str(file)])
    try:
        wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text().strip() != "", 10)
        yield f"http://127.0.0.1:{port}", run.pid
    finally:
        run.terminate()
        run.wait()


def start(stack: ExitStack, folder: ModelFolder, built: Path, core: int, root: Path) -> tuple[Service, Identity, int]:
    """Start a replica on a core; return it with what its figures are of, and with the server's process id."""
    inputs = read_inputs(folder, [generated(SENT[folder.name])] if folder.name in SENT else [])
    store = root / f"store-{core}"
    store.mkdir()
    with pinned(core):
        now = Identity.of(folder, built, inputs)
        now = replace(now, settings=replace(now.settings, workers=1, threads=1))
        trial = stack.enter_context(TrialServer(folder, built, inputs, root / f"run-{core}", store))
        return stack.enter_context(trial.started(now.settings)), now, trial.running.pid


def highest_rate(keeps: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """Return the highest rate that keeps the target, between two rates, by halving the interval."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return (low + high) / 2


def said_rate(replica: Replica, replicas: int, target: float) -> float:
    """Return the highest rate at which the model's replicas keep the target, in requests/s."""
    capacity = replicas * replica.capacity
    return highest_rate(lambda rate: latency(replica, replicas, rate).p99 <= target, 0.0, capacity, 8)


def check_model(
    folder: ModelFolder, target: float, seconds: float, show: Callable[[str], None]
) -> tuple[Figures, list[Result]]:
    """Measure one and two replicas of a model."""
    with tempfile.TemporaryDirectory(prefix="capacity-trial-") as temporary, ExitStack() as stack:
        root = Path(temporary)
        built = archive(folder, Server().store).path
        show("starts the replicas")
        started = [start(stack, folder, built, core, root) for core in CORES]
        services, identities, pids = zip(*started, strict=True)
        sent = services[0].inputs[0]
        with pinned(CORES[1]):  # the second replica is idle meanwhile: its core is free for the load generator
            figures = measured(services[0], identities[0], lambda step, _: show(step))
        show("warms up the second replica")
        with pinned(CORES[0]):
            warm_up(services[1], figures.points[-1].clients)
        hosts = [each.url.split("/")[2] for each in services]
        # TrialServer counts the names of its models, so that both replicas have the same
        path = services[0].url.partition(hosts[0])[2]
        balanced, pid = stack.enter_context(proxy(hosts, root / "nginx"))
        meter = Meter((*pids, pid))
        model, seeds = figures.replica, count(1)
        results = []
        for replicas, url in {1: services[0].url, 2: balanced + path}.items():
            capacity, said = replicas * model.capacity, said_rate(model, replicas, target)
            points: list[tuple[float, float]] = []

            def load(rate: float, lasts: float, url: str = url, replicas: int = replicas) -> LoadResult:
                show(f"{replicas} replicas, {rate:.0f} requests/s")
                with pinned(CORES[1]) if replicas == 1 else nullcontext():
                    return open_loop(url, sent.body, sent.headers, rate, lasts, CONNECTIONS, seed=next(seeds))

            def point(rate: float, load: Callable = load, points: list = points) -> LoadResult:
                seen = load(rate, seconds)
                points.append((rate, seen.p99))
                return seen

            def keeps(rate: float, point: Callable = point) -> bool:
                seen = point(rate)
                return seen.failed == 0 and seen.p99 <= target

            load(SHARES[-1] * capacity, WARM_UP_SECONDS)
            loads = {share: (point(share * capacity), latency(model, replicas, share * capacity)) for share in SHARES}
            rate = highest_rate(keeps, LOWEST * said, HIGHEST * said, STEPS)
            results.append(Result(folder.name, target, replicas, loads, points, rate, said))
        _, others = meter.read()
        note(f"{folder.name}: other processes used {others:.1%} of the CPU meanwhile.")
        return figures, results


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first has the headings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def table(results: list[Result]) -> str:
    """Return the results as Markdown: what was measured, what the model says, and the difference."""
    rows = [
        [
            "model",
            "p99 target",
            "replicas",
            "highest rate",
            *(f"p99 at {share:.0%} of the capacity" for share in SHARES),
        ]
    ]
    for each in results:
        cells = [each.model, f"{1000 * each.target:g} ms", str(each.replicas)]
        cells.append(f"{each.rate:,.0f}/s, model {each.said:,.0f}/s: {each.said / each.rate - 1:+.0%}")
        for seen, said in each.loads.values():
            times = f"{1000 * seen.p99:.0f} ms, model {1000 * said.p99:.0f} ms"
            cells.append(f"{times}: {said.p99 / seen.p99 - 1:+.0%} ({seen.answered:,} answers)")
        rows.append(cells)
    return markdown(rows)


def picture(figures: dict[str, Figures], results: list[Result]) -> bytes:
    """Return a chart of p99 against load, as SVG: the model's curves, and what was measured."""
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        panes = pyplot.subplots(1, len(figures), figsize=(5 * len(figures), 4), layout="constrained", squeeze=False)
        figure, [row] = panes
        for axes, (name, each) in zip(row, figures.items(), strict=True):
            axes.set(title=name, xlabel="requests/s", ylabel="p99 latency, ms (log)", yscale="log")
            for result, colour in zip([one for one in results if one.model == name], (GREEN, AMBER), strict=False):
                rates = [share * result.replicas * each.replica.capacity for share in CURVE]
                said = [1000 * latency(each.replica, result.replicas, rate).p99 for rate in rates]
                axes.plot(rates, said, color=colour, label=f"model, {result.replicas} replicas")
                rates, seen = zip(*result.measured, strict=True)
                axes.scatter(rates, [1000 * one for one in seen], s=16, color=colour, label="measured")
                axes.axhline(1000 * result.target, color=RED, linestyle="--", linewidth=1)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue()


def main(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL=P99", help="By default, image=150ms and cells=300ms.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of a measurement with requests at random times.")] = 14.0,
    anyway: Annotated[bool, typer.Option("--anyway", help="Measure, also while other processes are busy.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the results into docs/capacity.md.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Check the capacity model against one and two replicas, each on one core."""
    targets = {
        name: parse(p99) for name, _, p99 in (each.partition("=") for each in models or ["image=150ms", "cells=300ms"])
    }
    if not anyway:
        check_idle()
    results: list[Result] = []
    kept_figures: dict[str, Figures] = {}
    with progress() as bars:
        for folder in select(list(targets)):
            task = bars.add_task(folder.name, total=None, state="")
            figures, found = check_model(
                folder, targets[folder.name], seconds, lambda step, task=task: bars.update(task, state=step)
            )
            results += found
            kept_figures[folder.name] = figures
    text = f"{reliability.about()} {seconds:g} s for each measurement.\n\n{table(results)}"
    note(text)
    if output:
        figures_of = {name: asdict(each) for name, each in kept_figures.items()}
        output.write_text(json.dumps({"figures": figures_of, "results": [asdict(each) for each in results]}, indent=1))
    if write:
        write_atomically(PICTURE, picture(kept_figures, results))
        chart = f"![p99 against rate: the model's curves, and what was measured]({PICTURE.name})"
        reliability.write_section("checked", f"{text}\n\n{chart}", DOCUMENT)


if __name__ == "__main__":
    reliability.run(main, "tests.trials.capacity", " image=150ms", " --write")
