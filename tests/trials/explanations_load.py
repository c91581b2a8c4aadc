"""Measure how much explanations delay predictions: the p99 of predictions without and with one explanation a second.

python -m tests.trials.explanations_load image --rounds 5

It starts a server of its own. The explanations go to the model's own workers, or to a second registration of its
archive under another name, which starts as many workers again. The three cases take turns in every round.
"""

import contextlib
import statistics
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import requests
import typer
from rich.table import Table

from bundle.catalog import ModelFolder, select
from bundle.cli.console import console, progress
from bundle.errors import BundleError
from bundle.load.generator import closed_loop, open_loop
from bundle.samples import headers
from tests.server.place import Place, new_place, serving
from tests.trials import reliability

UTILISATION = 0.3  # of the capacity, by the predictions
CLIENTS = 32  # of the measurement of the capacity
EVERY = 1.0  # seconds from one explanation to the next
NONE, SHARED, APART = "without explanations", "in the model's workers", "in workers of their own"


def register_apart(place: Place, name: str) -> str:
    """Register the model's archive once more, and return its second name."""
    apart = f"{name}-explain"
    query = {"url": f"{name}.mar", "model_name": apart, "initial_workers": "1", "synchronous": "true"}
    answer = requests.post(f"{place.client.management}/models", params=query, timeout=300)
    if answer.status_code != 200:
        raise BundleError(f"{apart} could not be registered.", answer.text)
    return apart


@contextlib.contextmanager
def explaining(url: str | None, folder: ModelFolder) -> Iterator[list[int]]:
    """Send an explanation every second while the block runs, and collect the statuses of the answers."""
    statuses: list[int] = []
    ended = threading.Event()
    body = folder.sample_file.read_bytes()

    def send() -> None:
        while not ended.wait(EVERY):  # the next one waits until this one is answered
            statuses.append(requests.post(url, body, headers=headers(folder.sample_file), timeout=120).status_code)

    thread = threading.Thread(target=send)
    if url:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        if url:
            thread.join()


def measure(place: Place, folder: ModelFolder, rounds: int, seconds: float) -> Table:
    """Return the p50 and p99 of predictions in each case, medians over the rounds, and how the explanations ended."""
    inference, name = place.client.inference, folder.name
    predictions, sent = f"{inference}/predictions/{name}", headers(folder.sample_file)
    body = folder.sample_file.read_bytes()
    urls = {NONE: None, SHARED: f"{inference}/explanations/{name}"}
    urls[APART] = f"{inference}/explanations/{register_apart(place, name)}"
    for url in (urls[SHARED], urls[APART]):  # the first explanation of a worker imports Captum
        for _ in range(5):
            requests.post(url, body, headers=sent, timeout=300)
    closed_loop(predictions, body, sent, CLIENTS, 5)  # warm-up
    rate = UTILISATION * closed_loop(predictions, body, sent, CLIENTS, 5).throughput
    latencies: dict[str, list[tuple[float, float]]] = {case: [] for case in urls}
    answers: dict[str, list[int]] = {case: [] for case in urls}
    failed = dict.fromkeys(urls, 0)
    with progress() as bar:
        task = bar.add_task(name, total=rounds * len(urls), state="")
        for _ in range(rounds):
            for case, url in urls.items():
                with explaining(url, folder) as statuses:
                    load = open_loop(predictions, body, sent, rate, seconds)
                latencies[case].append((load.p50, load.p99))
                answers[case] += statuses
                failed[case] += load.failed
                bar.advance(task)
    columns = ("explanations", "p50 ms", "p99 ms", "failed", "explained", "429", "other")
    table = Table(*columns, title=f"{name}: {rate:.0f} predictions/s, {UTILISATION:.0%} of the capacity")
    for case, pairs in latencies.items():
        p50, p99 = (f"{1000 * statistics.median(column):.1f}" for column in zip(*pairs, strict=True))
        good, late = answers[case].count(200), answers[case].count(429)
        counts = (failed[case], good, late, len(answers[case]) - good - late)
        table.add_row(case, p50, p99, *map(str, counts))
    return table


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Names of models; by default, image.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all cases; the medians count.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Of one case in a round.")] = 20.0,
) -> None:
    """Measure the latency of predictions with and without one explanation a second."""
    folders = select(models or ["image"])
    with tempfile.TemporaryDirectory() as root:
        place = new_place(Path(root) / "run", Path(root) / "store")
        with serving(place, *(folder.name for folder in folders)):
            for folder in folders:
                console.print(measure(place, folder, rounds, seconds))


if __name__ == "__main__":
    reliability.run(main, "tests.trials.explanations_load", " image --rounds 5")
