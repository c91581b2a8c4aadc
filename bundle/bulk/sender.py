"""Send many inputs to a model of a running server, several at the same time, and repeat what may succeed later."""

import asyncio
import base64
import json
import random
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
import certifi
import requests
from yarl import URL

from bundle.bulk.inputs import Input
from bundle.bulk.record import Failure
from bundle.errors import NotRunning
from bundle.server.client import UNKNOWN_MODEL, Client
from bundle.server.http import ca_file

ANSWER_SECONDS = 300  # timeout of one request: TorchServe itself answers earlier, after a model's `responseTimeout`
CONNECT_SECONDS = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15  # seconds between the tries of an input; each pause is twice as long as the last
JITTER = 1.25  # inputs that were rejected together are not sent again together
KEY_SECONDS = 1  # a key is read again after this time
INVALID_KEY = "InvalidKeyException"
# the server guesses nothing from these, and an answer need not be decompressed
AUTOMATIC = ("Content-Type", "User-Agent", "Accept", "Accept-Encoding")

Finish = Callable[[dict[str, object], object], None]


class Rejected(Exception):
    """A try that brought no answer.

    Attributes:
        failure: why.
        seconds: for which the server asks to wait.
        away: whether the same would happen to every other input now.
    """

    def __init__(self, failure: Failure, seconds: float = 0, away: bool = False):
        super().__init__(failure.message)
        self.failure, self.seconds, self.away = failure, seconds, away


class Feed:
    """Inputs, read by a thread, so that a slow disk or pipe does not stop the requests in flight.

    The thread and the event loop wake each other only when one of them waits: to hand over each input with a lock and
    a wake-up takes a tenth of the processor time of its request.

    Args:
        inputs: runs in the thread.
        room: the most inputs that wait in memory. Only that many are read ahead.
    """

    def __init__(self, inputs: Iterable[Input], room: int):
        self._inputs, self._room = inputs, room
        self._loop = asyncio.get_running_loop()
        self._read: deque[tuple[Input, bytes | Failure]] = deque()
        self._end: list[BaseException | None] = []  # has one element as soon as all inputs are read
        self._has_room = threading.Event()
        self._has_input = asyncio.Event()
        self._awaited = self._closed = False
        threading.Thread(target=self._run, name="inputs", daemon=True).start()  # it may wait for a pipe at the end

    def _run(self) -> None:
        """Read the inputs, in the thread."""
        end = None
        try:
            for item in self._inputs:
                self._read.append((item, load(item)))
                self._wake()
                if len(self._read) >= self._room:
                    self._has_room.clear()
                    if len(self._read) >= self._room:  # the loop may have taken some before `clear`
                        self._has_room.wait()
                if self._closed:
                    return
        except BaseException as exc:  # raised where the inputs are taken
            end = exc
        self._end.append(end)
        self._wake()

    def _wake(self) -> None:
        """Wake the tasks that wait for an input."""
        if self._awaited:
            self._awaited = False
            with suppress(RuntimeError):  # the run has ended, and closed its loop
                self._loop.call_soon_threadsafe(self._has_input.set)

    async def take(self) -> tuple[Input, bytes | Failure] | None:
        """Return the next input with its content, or why it cannot be read; None after the last."""
        while not self._read:
            self._has_input.clear()
            self._awaited = True
            if self._read:  # the thread may have read one before `_awaited`
                break
            if self._end:
                if error := self._end[0]:
                    raise error
                return None
            await self._has_input.wait()
        taken = self._read.popleft()
        if len(self._read) <= self._room // 2 and not self._has_room.is_set():
            self._has_room.set()
        return taken

    def close(self) -> None:
        """End the thread, unless it waits for an input."""
        self._closed = True
        self._has_room.set()


class Sender:
    """Send inputs to one model.

    Args:
        client: of the server.
        path: of the requests: "predictions/mnist".
        options: parameters of every request.
        concurrency: the most requests in flight.
        patience: seconds for which an input is repeated while the server is overloaded or does not answer.
    """

    def __init__(self, client: Client, path: str, options: Mapping[str, str], concurrency: int, patience: float):
        self.client = client
        self.url = URL(f"{client.inference}/{path}").with_query(options)
        self.concurrency, self.patience = concurrency, patience
        self._heard = float("-inf")  # time of the last answer
        self._key, self._key_read = "", float("-inf")
        self._key_lock = asyncio.Lock()

    async def send(self, inputs: Iterable[Input], finish: Finish) -> None:
        """Send the inputs, and report each one as soon as its outcome is known.

        Args:
            finish: takes an input's name, and its answer or Failure.

        Raises:
            NotRunning: no server has accepted a request for `patience` seconds, or the model is not served any more.
        """
        feed = Feed(inputs, 2 * self.concurrency)
        connector = aiohttp.TCPConnector(limit=self.concurrency, ssl=trusted(self.client.inference))
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS)
        cookies = aiohttp.DummyCookieJar()
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, cookie_jar=cookies, skip_auto_headers=AUTOMATIC
                ) as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(self.concurrency):
                    group.create_task(self._send_next(session, feed, finish))
        except BaseExceptionGroup as failed:  # the first error has ended the others
            raise failed.exceptions[0] from None
        finally:
            feed.close()

    async def _send_next(self, session: aiohttp.ClientSession, feed: Feed, finish: Finish) -> None:
        """Send one input after the other."""
        while taken := await feed.take():
            item, content = taken
            outcome = content if isinstance(content, Failure) else await self._outcome(session, item, content)
            finish(item.name, outcome)

    async def _outcome(self, session: aiohttp.ClientSession, item: Input, content: bytes) -> object:
        """Return an input's answer, or the Failure of its last try."""
        began = time.monotonic()
        for pause in pauses():
            try:
                return await self._ask(session, item, content)
            except Rejected as exc:
                rejected = exc
            wait = random.uniform(1, JITTER) * max(rejected.seconds, pause)
            since = max(began, self._heard) if rejected.away else began
            is_last = time.monotonic() + wait > since + self.patience
            if is_last and rejected.away:
                message = f"{self.client.inference} has accepted no request for {self.patience:g} s."
                raise NotRunning(message, rejected.failure.message)
            if is_last or not rejected.failure.retriable:
                return rejected.failure
            await asyncio.sleep(wait)
        raise AssertionError("pauses do not end")

    async def _ask(self, session: aiohttp.ClientSession, item: Input, content: bytes) -> object:
        """Send an input once, and return its answer.

        Raises:
            Rejected: there is no answer.
            NotRunning: the model is not served any more.
        """
        try:
            headers = item.headers | await self._authorization()
            async with session.post(self.url, data=content, headers=headers, allow_redirects=False) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, requests.RequestException) as exc:
            failure = Failure(None, f"The server did not answer: {exc or type(exc).__name__}.")
            raise Rejected(failure, away=isinstance(exc, aiohttp.ClientConnectorError)) from exc
        if 200 <= response.status < 300:
            self._heard = time.monotonic()
            return answer(response.content_type, body)
        kind, message = described(body)
        if kind == INVALID_KEY:  # another command may have renewed it, or another server has started
            self._key_read = float("-inf")
            raise Rejected(Failure(None, f"The server rejects the key: {message}"), away=True)
        if kind in UNKNOWN_MODEL:
            raise NotRunning(f"{self.url} does not exist any more: {message}")
        self._heard = time.monotonic()
        failure = Failure(response.status, message or response.reason or "", kind or None)
        raise Rejected(failure, seconds_to_wait(response.headers.get("Retry-After", "")))

    async def _authorization(self) -> dict[str, str]:
        """Return the header with the key, if the server requires one."""
        keys = self.client.keys
        if keys is None:
            return {}
        async with self._key_lock:
            if time.monotonic() > self._key_read + KEY_SECONDS:
                self._key = await asyncio.to_thread(keys.header, "inference")
                self._key_read = time.monotonic()
        return {"Authorization": self._key}


def load(item: Input) -> bytes | Failure:
    """Return the body of an input's request, or why it cannot be read."""
    try:
        return item.read()
    except OSError as exc:
        return Failure(None, f"The file cannot be read: {exc.strerror or exc}.")
    except ValueError as exc:
        return Failure(None, str(exc))


def pauses() -> Iterator[float]:
    """Yield the seconds to wait after the first try, the second, and so on, without an end."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def seconds_to_wait(retry_after: str) -> float:
    """Return the seconds of a Retry-After header, which has a number or a date; 0 if it is missing or invalid."""
    with suppress(ValueError):
        return max(0.0, float(int(retry_after)))
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return 0.0


def described(body: bytes) -> tuple[str, str]:
    """Return the type and the message of an error's body; "" for what it does not have."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return "", body.decode(errors="replace").strip()


def answer(content_type: str, body: bytes) -> object:
    """Return an answer as JSON can hold it: JSON as it is, a text as a string, all else as a data: URL."""
    if not content_type.startswith(("image/", "audio/", "video/")):
        with suppress(ValueError):
            return json.loads(body)
        with suppress(UnicodeDecodeError):
            return body.decode()
    return f"data:{content_type};base64,{base64.b64encode(body).decode()}"


def trusted(url: str) -> ssl.SSLContext | bool:
    """Return what is trusted of a server over TLS: the same as by the other commands."""
    return ssl.create_default_context(cafile=ca_file() or certifi.where()) if url.startswith("https:") else True
