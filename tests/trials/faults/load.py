"""Trials of too much load: floods of large bodies, more requests than can be answered, clients that dawdle."""

import io
import math
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import requests
from PIL import Image

from tests.docker.stack import Stack, docker
from tests.trials.faults.traffic import Answer, Traffic, error_type, median, p99
from tests.trials.faults.trial import Outcome, Trial
from tests.trials.faults.workers import RATE, digits

TARGET = 1.0  # seconds: a request that waited longer is not begun (max_wait_seconds of the models)
FLOOD_CLIENTS = 48
FLOOD_BYTES = (16 << 20) - 1000  # just below max_request_size
PROXY_MEGABYTES = 1500
DAWDLERS = 150  # of each kind
CUT_OFF = 10.0  # s after which the proxy ends a client that sends nothing


def picture(width: int, height: int, kind: str) -> bytes:
    """Smooth colours: much to decode, and as PNG little to send."""
    rows, columns = numpy.indices((height, width), dtype=numpy.uint16)
    pixels = numpy.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(numpy.uint8)).save(file, kind)
    return file.getvalue()


def ask(url: str, body: bytes) -> Answer:
    began = time.monotonic()
    try:
        answer = requests.post(url, data=body, timeout=40)
    except requests.RequestException as exc:
        return Answer(began, time.monotonic(), None, problem=type(exc).__name__)
    right = answer.status_code == 200 and '"top_k"' in answer.text
    problem = "" if right else error_type(answer.text)
    return Answer(began, time.monotonic(), answer.status_code, right, "Retry-After" in answer.headers, problem)


def closed_loop(url: str, body: bytes, clients: int, seconds: float) -> list[Answer]:
    """Clients that ask again as soon as they are answered, or a moment after they were refused."""
    deadline = time.monotonic() + seconds
    answers: list[Answer] = []

    def client(_: int) -> None:
        while time.monotonic() < deadline:
            answers.append(ask(url, body))
            if not answers[-1].right:
                time.sleep(0.05)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return answers


def memory(stack: Stack, service: str) -> tuple[float, int]:
    """The most memory (MB) that a container has had, and how many of its processes were killed for want of it."""

    def read(version_2: str, version_1: str) -> str:
        command = f"cd /sys/fs/cgroup; cat {version_2} 2>/dev/null || cat memory/{version_1}"
        return docker("exec", stack.container(service), "sh", "-c", command)

    events = read("memory.events", "memory.oom_control").splitlines()
    [killed] = [line.split()[1] for line in events if line.startswith("oom_kill ")]
    return int(read("memory.peak", "memory.max_usage_in_bytes")) / 1e6, int(killed)


def flood(stack: Stack, seconds: float) -> Outcome:
    url = f"{stack.url('PORT')}/predictions/image"
    side = int((FLOOD_BYTES / 3) ** 0.5) - 8
    body = picture(side, side, "BMP")
    before = stack.inspect()["RestartCount"], stack.inspect("proxy")["RestartCount"]
    killed = [memory(stack, service)[1] for service in ("proxy", "torchserve")]
    with digits(stack, RATE / 2) as others:
        answers = closed_loop(url, body, FLOOD_CLIENTS, 3 * seconds)
    proxy, server = memory(stack, "proxy"), memory(stack, "torchserve")
    outcome = Outcome(answers + others.answers)
    outcome.notes += [
        f"{len(body) / 2**20:.1f} MiB each from {FLOOD_CLIENTS} clients",
        f"most memory so far: proxy {proxy[0]:.0f} MB, TorchServe and workers {server[0]:.0f} MB",
    ]
    after = stack.inspect()["RestartCount"], stack.inspect("proxy")["RestartCount"]
    outcome.require(after == before and [proxy[1], server[1]] == killed, "nothing is killed for want of memory")
    outcome.require(outcome.lost == 0, "no request is without an answer")
    outcome.require(outcome.failed == 0, "what is not answered is told when to come again")
    outcome.require(any(answer.right for answer in answers), "large bodies are answered, too")
    outcome.require(proxy[0] < PROXY_MEGABYTES, f"the proxy needs less than {PROXY_MEGABYTES} MB, of a limit of 2 GB")
    return outcome


def overload(stack: Stack, seconds: float) -> Outcome:
    url = f"{stack.url('PORT')}/predictions/image"
    body = picture(2000, 1500, "PNG")
    answers = closed_loop(url, body, 16, seconds + 2)
    rate = sum(answer.right for answer in answers) / (seconds + 2)
    with Traffic(url, body, '"top_k"', 0.5 * rate) as calm:
        time.sleep(seconds)
    with Traffic(url, body, '"top_k"', 3 * rate) as storm:
        time.sleep(max(5 * seconds, 15))
        ended = storm.stop()
        with Traffic(url, body, '"top_k"', 0.5 * rate, seed=2) as after:  # while the backlog is still there
            time.sleep(seconds + 5)
    recovery = recovery_time(after.answers, ended, median(calm.answers))
    outcome = Outcome(storm.answers + after.answers, recovery)
    right = [answer for answer in storm.answers if answer.right]
    refused = [answer for answer in storm.answers if answer.refused]
    outcome.notes += [
        f"capacity {rate:.0f}/s, asked {3 * rate:.0f}/s, answered {len(right) / (ended - storm.answers[0].due):.0f}/s",
        f"p99 of the answered {p99(right):.2f} s, of the refused {p99(refused):.2f} s, at half the capacity "
        f"{p99(calm.answers):.2f} s",
    ]
    outcome.require(outcome.lost == 0 and outcome.failed == 0, "what is not answered is told when to come again")
    outcome.require(p99(right) < 2 * TARGET, "what is answered has a p99 under twice the target (1 s)")
    outcome.require(p99(refused) < 2 * TARGET, "what is refused is refused as soon")
    outcome.require(len(right) > 0.5 * rate * (ended - storm.answers[0].due), "half of the capacity goes on, at least")
    outcome.require(recovery <= 5, "five seconds after, all is answered, and as fast as before")
    return outcome


def recovery_time(answers: list[Answer], ended: float, usual: float) -> float:
    """Seconds from the end of the load until all is answered, and no later than twice the usual: by the median of each
    second's requests, because even at half the capacity one of them waits now and then. Infinite without requests."""
    if not answers:
        return math.inf
    seconds: dict[int, list[Answer]] = {}
    for answer in answers:
        seconds.setdefault(math.floor(answer.due - ended), []).append(answer)
    slow = [
        second for second, sent in seconds.items() if not all(a.right for a in sent) or median(sent) > 2 * usual + 0.05
    ]
    return max(0.0, max(slow, default=-1) + 1)


def dawdle(port: int, stop: threading.Event) -> tuple[list[socket.socket], list[socket.socket]]:
    """Clients that send half a header or half a body, a tenth of which hang up; and those that send byte by byte."""
    head = b"POST /predictions/mnist HTTP/1.1\r\nHost: x\r\n"
    silent, trickling = [], []
    for opening, kind in (
        (head[:20], silent),
        (head + b"Content-Length: 1000\r\n\r\nhalf", silent),
        (head + b"Content-Length: 100000\r\n\r\n", trickling),
    ):
        for number in range(DAWDLERS):
            connection = socket.create_connection(("127.0.0.1", port), 10)
            connection.sendall(opening)
            if kind is silent and number % 10 == 0:
                connection.close()
            else:
                kind.append(connection)

    def trickle() -> None:
        while not stop.wait(1):
            for connection in trickling:
                try:
                    connection.sendall(b"x")
                except OSError:
                    pass

    threading.Thread(target=trickle, daemon=True).start()
    return silent, trickling


def slow_clients(stack: Stack, seconds: float) -> Outcome:
    """Without and with them, in turns."""
    answers, quiet, disturbed, left = [], [], [], 0
    for _ in range(3):
        with digits(stack) as without:
            time.sleep(seconds)
        stop = threading.Event()
        silent, trickling = dawdle(int(stack.environment["PORT"]), stop)
        with digits(stack) as among:
            time.sleep(max(seconds, CUT_OFF + 2))
        left += sum(map(is_open, silent))
        stop.set()
        for connection in silent + trickling:
            connection.close()
        answers += without.answers + among.answers
        quiet.append(p99(without.answers))
        disturbed.append(p99(among.answers))
    outcome = Outcome(answers)
    ratio = statistics.median(disturbed) / statistics.median(quiet)
    outcome.notes.append(
        f"{3 * DAWDLERS} slow clients; p99 {1000 * statistics.median(quiet):.0f} ms without, "
        f"{1000 * statistics.median(disturbed):.0f} ms among them (medians of 3)"
    )
    outcome.require(outcome.answered == len(answers), "other clients are answered")
    outcome.require(ratio < 2, "with the same p99, within twice of it on a shared machine")
    outcome.require(left == 0, f"clients that send nothing for {CUT_OFF:.0f} s are cut off")
    return outcome


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


TRIALS = (
    Trial(
        "flood",
        "a flood of the largest allowed bodies",
        "memory is bounded; 429 with Retry-After; nothing is killed",
        flood,
    ),
    Trial(
        "overload",
        "three times the load that can be carried",
        "what is answered has a p99 under twice the target of 1 s, the rest is refused as soon; as before within 5 s",
        overload,
    ),
    Trial(
        "slow-clients",
        "clients that dawdle: half a header, half a body, byte by byte, hung up",
        "those that send nothing are cut off; the p99 of others is the same (within twice of it)",
        slow_clients,
    ),
)
