"""Send requests in an open loop, and count every answer: requests do not wait for earlier answers."""

import asyncio
import json
import math
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import requests

LOST_SECONDS = 40.0  # without an answer for this long, a request is lost; longer than any deadline of the stack
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Answer:
    """The result of one request. Times are seconds of `time.monotonic`.

    Attributes:
        due: when it was scheduled; latency counts from here.
        done: when it was answered or failed.
        status: HTTP status; None without an answer.
        right: whether the answer is a 200 with the expected content.
        retry_after: whether the answer has a Retry-After header.
        problem: the error type in the body, or the name of the exception if there is no answer.
    """

    due: float
    done: float
    status: int | None
    right: bool = False
    retry_after: bool = False
    problem: str = ""

    @property
    def refused(self) -> bool:
        """Whether the request was rejected: 429 or 503 with Retry-After. After WorkerDied it was begun, twice."""
        return self.status in REFUSALS and self.retry_after and self.problem != "WorkerDied"

    @property
    def seconds(self) -> float:
        return self.done - self.due


class PoissonTraffic:
    """Send one input at random times (Poisson arrivals) until the `with` block ends, then wait for open requests.

    Args:
        url: target of the POST requests.
        body: their body.
        expected: text that every correct answer contains.
        rate: requests per second.
        seed: of the random times.
    """

    def __init__(self, url: str, body: bytes, expected: str, rate: float, seed: int = 1):
        self.url, self.body, self.expected, self.rate = url, body, expected, rate
        self.answers: list[Answer] = []
        self.sent = 0
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), name="traffic")

    async def _send(self) -> None:
        timeout = aiohttp.ClientTimeout(total=LOST_SECONDS)
        # each on a new connection: one that the proxy closes while it is idle may get a request at the same moment,
        # which nobody has accepted, and clients send again
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            due, in_flight = time.monotonic(), set()
            while not self._stop.is_set():
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.sent += 1
                request = asyncio.create_task(self._ask(session, due))
                in_flight.add(request)
                request.add_done_callback(in_flight.discard)
                due += self._random.expovariate(self.rate)
            await asyncio.gather(*in_flight)

    async def _ask(self, session: aiohttp.ClientSession, due: float) -> None:
        try:
            async with session.post(self.url, data=self.body) as answer:
                text = await answer.text()
            right = answer.status == 200 and self.expected in text
            retry_after = "Retry-After" in answer.headers
            problem = "" if right else error_type(text)
            self.answers.append(Answer(due, time.monotonic(), answer.status, right, retry_after, problem))
        except Exception as exc:  # every request that was sent must be counted
            self.answers.append(Answer(due, time.monotonic(), None, problem=type(exc).__name__))

    def stop(self) -> float:
        """Stop sending, and return the time."""
        self._stop.set()
        return time.monotonic()

    def __enter__(self) -> "PoissonTraffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()
        assert len(self.answers) == self.sent


class Connections:
    """Send one input over connections that stay open, until the `with` block ends.

    A thread of the frontend serves a connection for its whole life. A call that holds the thread silences the thread's
    connections while others go on, so that the answers of all together show no gap.

    Args:
        url, body, expected: see `PoissonTraffic`.
        count: number of connections; several for each thread of the frontend.
        pause: seconds between an answer and the connection's next request.

    Attributes:
        answers: of each connection, in order.
    """

    def __init__(self, url: str, body: bytes, expected: str, count: int = 16, pause: float = 0.1):
        self.url, self.body, self.expected, self.pause = url, body, expected, pause
        self.answers: list[list[Answer]] = [[] for _ in range(count)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=[each]) for each in self.answers]

    def _send(self, answers: list[Answer]) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._stop.wait(self.pause):
                due = time.monotonic()
                try:
                    answer = session.post(self.url, data=self.body, timeout=LOST_SECONDS)
                except requests.RequestException as exc:
                    answers.append(Answer(due, time.monotonic(), None, problem=type(exc).__name__))
                    continue
                right = answer.status_code == 200 and self.expected in answer.text
                retry_after = "Retry-After" in answer.headers
                problem = "" if right else error_type(answer.text)
                answers.append(Answer(due, time.monotonic(), answer.status_code, right, retry_after, problem))

    @property
    def silence(self) -> float:
        """The longest time that any one connection had no correct answer, in seconds."""
        return max(longest_silence(each) for each in self.answers)

    def __enter__(self) -> "Connections":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def error_type(body: str) -> str:
    """Return the `type` of an error body of the bundle, the proxy or TorchServe."""
    try:
        return json.loads(body)["type"]
    except (ValueError, KeyError, TypeError):
        return "no error body"


def median(answers: list[Answer]) -> float:
    """Return the median latency in seconds; infinity without answers."""
    return statistics.median(answer.seconds for answer in answers) if answers else math.inf


def p99(answers: list[Answer]) -> float:
    """Return the 99th percentile of latency in seconds; infinity without answers."""
    seconds = sorted(answer.seconds for answer in answers)
    return seconds[math.ceil(0.99 * len(seconds)) - 1] if seconds else math.inf


def longest_silence(answers: list[Answer]) -> float:
    """Return the longest time without a correct answer, in seconds, while requests were sent."""
    if not answers:
        return 0.0
    begin, end = min(answer.due for answer in answers), max(answer.due for answer in answers)
    right = sorted(answer.done for answer in answers if answer.right)
    times = [begin, *(moment for moment in right if moment <= end), end]
    return max(later - earlier for earlier, later in zip(times, times[1:], strict=False))


def statuses(answers: list[Answer]) -> Counter[str]:
    """Count the answers by status and error type, or by the exception if there was no answer."""
    return Counter(" ".join(filter(None, (str(answer.status or ""), answer.problem))) for answer in answers)


def eventually(found: Callable[[], object], seconds: float) -> bool:
    """Wait until `found()` is true, and return whether it became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found():
            return True
        time.sleep(0.05)
    return False
