"""Constant load in an open loop, counted request by request: requests leave at their time, answered or not."""

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

LOST_SECONDS = 40.0  # a request without an answer for so long is lost: longer than any deadline of the stack
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Answer:
    """What became of one request. Times are those of `time.monotonic`.

    Attributes:
        due: when it was to leave, which is what latency counts from.
        done: when its answer was there, or it was given up.
        status: of the answer; None where there was none.
        right: a 200 that says what was expected.
        retry_after: whether the answer says when to come again.
        problem: the type that an error's body names, or the exception that took the place of an answer.
    """

    due: float
    done: float
    status: int | None
    right: bool = False
    retry_after: bool = False
    problem: str = ""

    @property
    def refused(self) -> bool:
        """Told to come again: 429 or 503 with Retry-After."""
        return self.status in REFUSALS and self.retry_after

    @property
    def seconds(self) -> float:
        return self.done - self.due


class Traffic:
    """Sends one input at random times (Poisson arrivals) until the block ends, and then waits for what is on its way.

    Args:
        url: where to POST.
        body: what to POST.
        expected: a text that is in every right answer.
        rate: requests a second.
        seed: of the times.
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
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            due, on_their_way = time.monotonic(), set()
            while not self._stop.is_set():
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.sent += 1
                request = asyncio.create_task(self._ask(session, due))
                on_their_way.add(request)
                request.add_done_callback(on_their_way.discard)
                due += self._random.expovariate(self.rate)
            await asyncio.gather(*on_their_way)

    async def _ask(self, session: aiohttp.ClientSession, due: float) -> None:
        try:
            async with session.post(self.url, data=self.body) as answer:
                text = await answer.text()
            right = answer.status == 200 and self.expected in text
            told = "Retry-After" in answer.headers
            problem = "" if right else error_type(text)
            self.answers.append(Answer(due, time.monotonic(), answer.status, right, told, problem))
        except Exception as exc:  # whatever it is, a request that was sent is counted
            self.answers.append(Answer(due, time.monotonic(), None, problem=type(exc).__name__))

    def stop(self) -> float:
        """Sends no more, and says since when."""
        self._stop.set()
        return time.monotonic()

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()
        assert len(self.answers) == self.sent


def error_type(body: str) -> str:
    """As the bundle's, the proxy's and TorchServe's error bodies name it."""
    try:
        return json.loads(body)["type"]
    except (ValueError, KeyError, TypeError):
        return "no error body"


def median(answers: list[Answer]) -> float:
    """Seconds; infinite where there is no answer."""
    return statistics.median(answer.seconds for answer in answers) if answers else math.inf


def p99(answers: list[Answer]) -> float:
    """Seconds that 99 % of the answers took at most."""
    seconds = sorted(answer.seconds for answer in answers)
    return seconds[math.ceil(0.99 * len(seconds)) - 1] if seconds else math.inf


def longest_silence(answers: list[Answer]) -> float:
    """The longest time without a right answer, in seconds, while requests were sent."""
    if not answers:
        return 0.0
    begin, end = min(answer.due for answer in answers), max(answer.due for answer in answers)
    right = sorted(answer.done for answer in answers if answer.right)
    times = [begin, *(moment for moment in right if moment <= end), end]
    return max(later - earlier for earlier, later in zip(times, times[1:], strict=False))


def statuses(answers: list[Answer]) -> Counter[str]:
    """How many answers had each status and type of error, or each reason for having none."""
    return Counter(" ".join(filter(None, (str(answer.status or ""), answer.problem))) for answer in answers)


def eventually(found: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found():
            return True
        time.sleep(0.05)
    return False
