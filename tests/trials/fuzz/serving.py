"""Send the cases to a running server, in bursts with valid requests among them, so that they share batches."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from bundle.catalog import select
from bundle.errors import BundleError
from bundle.server.client import Client
from tests.trials.fuzz.cases import BODY_LIMIT, Case, case, model_of
from tests.trials.fuzz.corpus import good, headers, sample
from tests.trials.fuzz.findings import Findings
from tests.trials.fuzz.verdict import Answer, Tally, agree, scores

ROUNDS = 20  # parts of the run; after each, the server gets no requests and its memory is read
BURST, GOOD = 12, 4  # mutated and valid requests that one model gets at the same time
BUSY = 0.2  # seconds, in which no worker ends its first explanation
SETTLE = 1.0  # s without requests before memory is read
PRIMING, AT_ONCE = 64, 8  # bodies of the largest size before the first case, because the heap grows to its usual size
DEFAULT_DEADLINE = 30.0  # s, if a model's config has no responseTimeout
PATIENCE = 15.0  # s after the deadline until a request counts as unanswered
CLEAR = 0.3  # least score of a valid request's first class: among lower ones, a swapped answer is not noticed
TOLERANCE = 0.2  # of the scores: each worker chooses its own precision, and rounding depends on the batch size

Neighbour = tuple[bytes, dict[str, float]]  # an input, and the scores of its classes


@dataclass(frozen=True)
class Snapshot:
    """The memory and the workers of an idle server.

    Attributes:
        sent: cases so far.
        frontend: resident bytes of the Java process.
        workers: resident bytes of all workers of each model.
        pids: PIDs of each model's workers.
    """

    sent: int
    frontend: int
    workers: dict[str, int]
    pids: dict[str, list[int]]


@dataclass
class Run:
    """The results of a run.

    Attributes:
        tallies: the counted answers, by model.
        snapshots: one at the start, and one after each round.
        batches: by model, the number of batches and of the requests in them.
        seconds: length of the run.
    """

    tallies: dict[str, Tally]
    snapshots: list[Snapshot] = field(default_factory=list)
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0


class Fuzzer:
    """Send cases to one server.

    Args:
        client: of the server.
        metrics: URL of its metrics API.
        pid: PID of the server's Java process.
        models: to send cases to.
        seed: of the cases.
        findings: get the failures.
        progress: is called after each burst with its number of cases.
    """

    def __init__(
        self,
        client: Client,
        metrics: str,
        pid: int,
        models: tuple[str, ...],
        seed: int,
        findings: Findings,
        progress: Callable[[int], None],
    ):
        self.client, self.metrics, self.pid, self.models, self.seed = client, metrics, pid, models, seed
        self.findings, self.progress = findings, progress
        self.deadlines = {folder.name: deadline(folder.config) for folder in select(list(models))}
        self.run = Run({model: Tally() for model in models})
        self.neighbours: dict[str, list[Neighbour]] = {}

    async def fuzz(self, cases: int) -> Run:
        """Send this many cases, and take a snapshot of the server after each round."""
        start = time.monotonic()
        # one connection per request: a broken connection must not affect another request
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        skipped = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
        async with aiohttp.ClientSession(connector=connector, skip_auto_headers=skipped) as self.session:
            for model in self.models:
                self.neighbours[model] = await self.ask_alone(model)
            await self.fill_heap()
            await asyncio.gather(*map(self.explain_once, self.models))
            edges = [cases * turn // ROUNDS for turn in range(ROUNDS + 1)]
            self.take_snapshot(0)
            for first, end in zip(edges, edges[1:], strict=False):
                numbers = range(first, end)
                await asyncio.gather(*(self.send_all(model, numbers) for model in self.models))
                await asyncio.sleep(SETTLE)
                self.take_snapshot(end)
            self.run.batches = await self.read_batches()
        self.run.seconds = time.monotonic() - start
        return self.run

    async def ask_alone(self, model: str) -> list[Neighbour]:
        """Return the valid inputs with their answers from an idle server. The model's own sample is the first.

        Raises:
            BundleError: the answer to the model's own sample is not what its folder expects, or not clear.
        """
        [folder] = select([model])
        found: list[Neighbour] = []
        for name, content in good(model).items():
            answer = await self.ask(model, self.good_case(model, content))
            if answer.status != 200:
                continue
            classes = scores(json.loads(answer.body))
            label = next(iter(classes), None)
            if name == "sample" and label != folder.bundle.expect:
                raise BundleError(f"{model} answered its sample with {label}. Expected: {folder.bundle.expect}.")
            if max(classes.values(), default=0.0) > CLEAR:
                found.append((content, classes))
        if not found or found[0][0] != sample(model):
            raise BundleError(f"{model} did not answer its own sample, or its first class has {CLEAR} or less.")
        return found

    async def fill_heap(self) -> None:
        """Send large bodies until the Java heap has its usual size, so that later growth is a leak."""
        large = self.good_case(self.models[0], good(self.models[0])["sample"].ljust(BODY_LIMIT, b"\0"))
        for _ in range(PRIMING // AT_ONCE):
            await asyncio.gather(*(self.ask(large.model, large) for _ in range(AT_ONCE)))

    async def explain_once(self, model: str) -> None:
        """Have each worker explain an answer: what the first explanation imports is not a leak."""
        explanation = self.good_case(model, good(model)["sample"], "explanations")
        asked = []
        for _ in self.client.describe(model)["workers"]:
            asked.append(asyncio.create_task(self.ask(model, explanation)))
            await asyncio.sleep(BUSY)  # the worker that has taken it does not take the next one
        await asyncio.gather(*asked)

    def good_case(self, model: str, content: bytes, verb: str = "predictions") -> Case:
        own = tuple(headers(model).items())
        return Case(self.seed, -1, model, "POST", f"/{verb}/{model}", own, content, False, "good")

    async def send_all(self, model: str, numbers: range) -> None:
        """Send those of these cases that are the model's."""
        own = [number for number in numbers if model_of(number, self.models) == model]
        for start in range(0, len(own), BURST):
            await self.burst(model, own[start : start + BURST])

    async def burst(self, model: str, numbers: list[int]) -> None:
        """Send mutated and valid requests at the same time, in random order, and check the answers."""
        cases = [case(self.seed, number, self.models) for number in numbers]
        random = Random(f"{self.seed} {numbers[0]} neighbours")
        neighbours = random.choices(self.neighbours[model], k=GOOD)
        sent: list[tuple[Case, Neighbour | None]] = [(one, None) for one in cases]
        sent += [(self.good_case(model, neighbour[0]), neighbour) for neighbour in neighbours]
        random.shuffle(sent)
        answers = await asyncio.gather(*(self.ask(model, one) for one, _ in sent))
        tally = self.run.tallies[model]
        for (one, neighbour), answer in zip(sent, answers, strict=True):
            if neighbour is not None:
                self.check_neighbour(one, neighbour, answer, cases)
            elif problem := tally.add(one, answer, self.deadlines[model]):
                self.findings.save(one, problem, self.client.inference, answer)
        self.progress(len(cases))

    def check_neighbour(self, sent: Case, expected: Neighbour, answer: Answer, beside: list[Case]) -> None:
        tally = self.run.tallies[sent.model]
        tally.neighbours += 1
        _, classes = expected
        if answer.status == 200 and agree(scores(json.loads(answer.body)), classes, TOLERANCE):
            return
        tally.wrong_neighbours += 1
        self.findings.save_neighbour(sent, next(iter(classes)), answer, beside, self.client.inference)

    async def ask(self, model: str, one: Case) -> Answer:
        start = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=self.deadlines[model] + PATIENCE)
        body = chunks(one.body) if one.chunked else one.body
        try:
            url = URL(self.client.inference + one.path, encoded=True)
            sent = self.session.request(one.method, url, data=body, headers=one.headers, timeout=timeout)
            async with sent as answer:
                return Answer(answer.status, await answer.read(), time.monotonic() - start)
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            return Answer(0, repr(exc).encode(), time.monotonic() - start)

    def take_snapshot(self, sent: int) -> None:
        pids = {
            model: sorted(worker["pid"] for worker in self.client.describe(model)["workers"]) for model in self.models
        }
        workers = {model: sum(map(resident, found)) for model, found in pids.items()}
        self.run.snapshots.append(Snapshot(sent, resident(self.pid), workers, pids))

    async def read_batches(self) -> dict[str, tuple[int, int]]:
        """Return the batches from the server's metrics; they show whether requests shared batches."""
        async with self.session.get(f"{self.metrics}/metrics") as answer:
            families = text_string_to_metric_families(await answer.text())
        samples = [one for family in families for one in family.samples if one.name.startswith("bundle_batch_size_")]

        def total(model: str, suffix: str) -> int:
            matching = (one for one in samples if one.labels["ModelName"] == model and one.name.endswith(suffix))
            return int(sum(one.value for one in matching))

        return {model: (total(model, "_count"), total(model, "_sum")) for model in self.models}


async def chunks(body: bytes) -> object:
    """Yield the body in parts, so that it is sent without a Content-Length."""
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]


def deadline(config: dict) -> float:
    return float(config.get("responseTimeout", DEFAULT_DEADLINE))


def resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
