"""Measure what traces cost: the throughput before they were built in, with them off, and with 10 % and all sampled.

python -m tests.trials.tracing mnist text --before main --rounds 15

Each arm is a server of its own. They take turns in every round, in another order each time, and the ratios are those of
the same round, so that a machine that gets slower or faster does not matter. The receiver answers every call, and does
not read what it gets: a collector runs elsewhere.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.progress import track
from rich.table import Table

from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, errors
from bundle.load.generator import closed_loop
from bundle.paths import ROOT
from bundle.samples import headers
from tests.server.place import Place, new_place, serving

BEFORE, OFF, TENTH, ALL = "before", "off", "10 %", "100 %"
METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
RECEIVER = f"""
import grpc, sys, threading
from concurrent import futures

answer = grpc.unary_unary_rpc_method_handler(lambda sent, context: print(len(sent), flush=True) or b"")
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler({METHOD.split("/")[1]!r}, {{"Export": answer}})])
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
threading.Event().wait()
"""


@dataclass(frozen=True)
class PlaceOf(Place):
    """A place whose commands are those of another checkout."""

    root: Path = ROOT

    def bundle(self, *arguments: str, **overrides: str) -> subprocess.CompletedProcess:
        environment = {**self.environment, "PYTHONPATH": str(self.root), **overrides}
        command = [sys.executable, "-m", "bundle", *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=600)


@contextlib.contextmanager
def receiving(log: Path) -> Iterator[str]:
    """Run a receiver in a process of its own, and yield its URL."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=output)
        try:
            while not (text := log.read_text()).endswith("\n"):
                assert process.poll() is None
            port = text.split()[0]
            grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(20)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """Check out a revision into the folder while the block runs."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), revision], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def measure(places: dict[str, Place], folder: ModelFolder, rounds: int, seconds: float, clients: int) -> Table:
    """Return the throughput of each arm, and its ratios, as medians over the rounds with their quartiles."""
    body, sent = folder.sample_file.read_bytes(), headers(folder.sample_file)
    rates: dict[str, list[float]] = {arm: [] for arm in places}
    urls = {arm: f"{place.client.inference}/predictions/{folder.name}" for arm, place in places.items()}
    for _ in range(2):  # warm-up
        for url in urls.values():
            closed_loop(url, body, sent, clients, 4)
    for number in track(range(rounds), folder.name, console=errors):
        order = list(urls)
        for arm in order[number % len(order) :] + order[: number % len(order)]:
            seen = closed_loop(urls[arm], body, sent, clients, seconds)
            assert not seen.failed, f"{seen.failed} requests failed ({arm})"
            rates[arm].append(seen.throughput)
    table = Table("traces", "requests/s", "against", "ratio", "quartiles", title=folder.name)
    for arm, against in ((BEFORE, None), (OFF, BEFORE), (TENTH, OFF), (ALL, OFF)):
        if arm not in rates:
            continue
        cells = [arm, f"{statistics.median(rates[arm]):,.0f}"]
        if against in rates:
            ratios = [one / other for one, other in zip(rates[arm], rates[against], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells += [against, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(*cells)
    return table


def main(
    models: Annotated[list[str], typer.Argument(help="Models that are measured.")],
    before: Annotated[str, typer.Option(help="Revision without traces; '' to leave it out.")] = "",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of all arms.")] = 15,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of load on each arm in a round.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Clients that wait for their answers.")] = 64,
) -> None:
    """Measure what traces cost."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tracing-")))
        url = stack.enter_context(receiving(folder / "received"))
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        roots = {arm: ROOT for arm in (OFF, TENTH, ALL)}
        if before:
            roots = {BEFORE: stack.enter_context(checkout(before, folder / "before")), **roots}
        for model in select(models):
            with contextlib.ExitStack() as servers:
                places: dict[str, Place] = {}
                for arm, root in roots.items():
                    store = folder / f"store-{'before' if arm == BEFORE else 'now'}"
                    store.mkdir(exist_ok=True)
                    new = new_place(folder / f"{model.name}-{arm.split()[0]}", store)
                    own = {name: value for name, value in new.environment.items() if name in plain or name[:3] == "TS_"}
                    own |= {"RUN_DIR": new.environment["RUN_DIR"], "COLUMNS": "160"}
                    if arm in (TENTH, ALL):
                        ratio = "0.1" if arm == TENTH else "1"
                        own |= {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
                        own |= {"OTEL_TRACES_SAMPLER_ARG": ratio}
                    places[arm] = PlaceOf(own, new.ports, root)
                    servers.enter_context(serving(places[arm], model.name))
                console.print(measure(places, model, rounds, seconds, clients))
                received = list(map(int, (folder / "received").read_text().split()[1:]))
                console.print(f"received so far: {len(received):,} calls, {sum(received) / 1e6:,.1f} MB")


if __name__ == "__main__":
    typer.run(main)
