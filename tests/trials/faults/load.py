"""Trials of overload: floods of large bodies, more requests than the server can answer, slow clients."""

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
from tests.trials.faults.traffic import Answer, PoissonTraffic, error_type, median, p99
from tests.trials.faults.trial import Outcome, Trial
from tests.trials.faults.workers import RATE, digit_traffic

TARGET = 1.0  # s: a request that waited longer is not processed (max_wait_seconds of the models)
FLOOD_CLIENTS = 48
FLOOD_BYTES = (16 << 20) - 1000  # just below max_request_size
PROXY_MEGABYTES = 1500
SLOW_CLIENTS = 150  # of each kind
CUT_OFF = 10.0  # s after which the proxy disconnects a client that sends nothing


def picture(width: int, height: int, kind: str) -> bytes:
    """Return an image of smooth colours: large when decoded, but small as a PNG."""
    rows, columns = numpy.indices((height, width), dtype=numpy.uint16)
    pixels = numpy.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(numpy.uint8)).save(file, kind)
    return file.getvalue()


def ask(url: str, body: bytes, expected: str) -> Answer:
    began = time.monotonic()
    try:
        answer = requests.post(url, data=body, timeout=40)
    except requests.RequestException as exc:
        return Answer(began, time.monotonic(), None, problem=type(exc).__name__)
    right = answer.status_code == 200 and expected in answer.text
    problem = "" if right else error_type(answer.text)
    return Answer(began, time.monotonic(), answer.status_code, right, "Retry-After" in answer.headers, problem)


def closed_loop(url: str, body: bytes, clients: int, seconds: float, expected: str = '"top_k"') -> list[Answer]:
    """Send requests from many clients: each sends the next after an answer, or 50 ms after a rejection."""
    deadline = time.monotonic() + seconds
    answers: list[Answer] = []

    def client(_: int) -> None:
        while time.monotonic() < deadline:
            answers.append(ask(url, body, expected))
            if not answers[-1].right:
                time.sleep(0.05)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return answers


def memory(stack: Stack, service: str) -> tuple[float, int]:
    """Return a container's peak memory in MB, and how many of its processes were killed for lack of memory."""

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
    with digit_traffic(stack, RATE / 2) as others:
        answers = closed_loop(url, body, FLOOD_CLIENTS, 3 * seconds)
    proxy, server = memory(stack, "proxy"), memory(stack, "torchserve")
    outcome = Outcome(answers + others.answers)
    outcome.notes += [
        f"{FLOOD_CLIENTS} clients with bodies of {len(body) / 2**20:.1f} MiB",
        f"peak memory so far: proxy {proxy[0]:.0f} MB, TorchServe and workers {server[0]:.0f} MB",
    ]
    after = stack.inspect()["RestartCount"], stack.inspect("proxy")["RestartCount"]
    outcome.require(after == before and [proxy[1], server[1]] == killed, "no process is killed for lack of memory")
    outcome.require(outcome.lost == 0, "every request is answered")
    outcome.require(outcome.failed == 0, "excess requests are rejected with Retry-After")
    outcome.require(any(answer.right for answer in answers), "some requests with large bodies succeed")
    outcome.require(proxy[0] < PROXY_MEGABYTES, f"the proxy needs less than {PROXY_MEGABYTES} MB of its limit of 2 GB")
    return outcome


def overload(stack: Stack, seconds: float) -> Outcome:
    return overloaded(f"{stack.url('PORT')}/predictions/image", picture(2000, 1500, "PNG"), '"top_k"', seconds)


def overloaded(url: str, body: bytes, expected: str, seconds: float) -> Outcome:
    """Send three times as many requests as are answered, each with this body.

    If only latencies are too long, it is repeated once: other work on the machine may have caused them.

    Args:
        expected: text that every correct answer contains.
    """
    first = overloaded_once(url, body, expected, seconds)
    if not first.broken or not all("p99" in limit for limit in first.broken):
        return first
    second = overloaded_once(url, body, expected, seconds)
    second.notes.append(f"the attempt before it: {first.notes[-1]}")
    return second


def overloaded_once(url: str, body: bytes, expected: str, seconds: float) -> Outcome:
    answers = closed_loop(url, body, 16, seconds + 2, expected)
    rate = sum(answer.right for answer in answers) / (seconds + 2)
    with PoissonTraffic(url, body, expected, 0.5 * rate) as calm:
        time.sleep(seconds)
    with PoissonTraffic(url, body, expected, 3 * rate) as storm:
        time.sleep(max(5 * seconds, 15))
        ended = storm.stop()
        with PoissonTraffic(url, body, expected, 0.5 * rate, seed=2) as after:  # while the backlog is still there
            time.sleep(seconds + 5)
    recovery = recovery_time(after.answers, ended, median(calm.answers))
    outcome = Outcome(storm.answers + after.answers, recovery)
    right = [answer for answer in storm.answers if answer.right]
    refused = [answer for answer in storm.answers if answer.refused]
    outcome.notes += [
        f"capacity {rate:.0f}/s, sent {3 * rate:.0f}/s, answered {len(right) / (ended - storm.answers[0].due):.0f}/s",
        f"p99 during the overload {p99(right):.2f} s, of rejections {p99(refused):.2f} s, at half the capacity "
        f"{p99(calm.answers):.2f} s",
    ]
    outcome.require(outcome.lost == 0 and outcome.failed == 0, "excess requests are rejected with Retry-After")
    outcome.require(p99(right) < 2 * TARGET, "the p99 of correct answers is under twice the target (1 s)")
    outcome.require(p99(refused) < 2 * TARGET, "the p99 of rejections is under twice the target (1 s)")
    outcome.require(len(right) > 0.5 * rate * (ended - storm.answers[0].due), "throughput is over half the capacity")
    outcome.require(recovery <= 5, "within 5 s after the load, all requests are answered, as fast as before")
    return outcome


def recovery_time(answers: list[Answer], ended: float, usual: float) -> float:
    """Return the seconds from the end of the overload until normal service; infinity without requests.

    Service is normal from the second on in which every request is answered correctly, and the median latency is at most
    twice the usual one. It is the median because single requests wait even at half the capacity.

    Args:
        answers: of requests sent after the overload.
        ended: end of the overload (`time.monotonic`).
        usual: median latency in seconds at this rate.
    """
    if not answers:
        return math.inf
    seconds: dict[int, list[Answer]] = {}
    for answer in answers:
        seconds.setdefault(math.floor(answer.due - ended), []).append(answer)
    slow = [
        second for second, sent in seconds.items() if not all(a.right for a in sent) or median(sent) > 2 * usual + 0.05
    ]
    return max(0.0, max(slow, default=-1) + 1)


def open_slow_clients(port: int, stop: threading.Event) -> tuple[list[socket.socket], list[socket.socket]]:
    """Open connections of slow clients.

    Returns:
        clients that stop after half a header or half a body (a tenth of them disconnect), and clients that send one
        byte per second.
    """
    head = b"POST /predictions/mnist HTTP/1.1\r\nHost: x\r\n"
    silent, trickling = [], []
    for opening, kind in (
        (head[:20], silent),
        (head + b"Content-Length: 1000\r\n\r\nhalf", silent),
        (head + b"Content-Length: 100000\r\n\r\n", trickling),
    ):
        for number in range(SLOW_CLIENTS):
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
    """Measure other clients' latency with and without slow clients, alternating three times."""
    answers, quiet, disturbed, left = [], [], [], 0
    for _ in range(3):
        with digit_traffic(stack) as without:
            time.sleep(seconds)
        stop = threading.Event()
        silent, trickling = open_slow_clients(int(stack.environment["PORT"]), stop)
        with digit_traffic(stack) as among:
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
        f"{3 * SLOW_CLIENTS} slow clients; p99 {1000 * statistics.median(quiet):.0f} ms without them, "
        f"{1000 * statistics.median(disturbed):.0f} ms with them (medians of 3)"
    )
    outcome.require(outcome.answered == len(answers), "other clients get correct answers")
    outcome.require(ratio < 2, "the p99 of other clients is less than doubled")
    outcome.require(left == 0, f"clients that send nothing for {CUT_OFF:.0f} s are disconnected")
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
        "memory is bounded; excess requests get 429 with Retry-After; no process is killed",
        flood,
    ),
    Trial(
        "overload",
        "three times the load that the server can handle",
        "the p99 of correct answers is under twice the target of 1 s, and that of rejections as well; normal service "
        "within 5 s",
        overload,
    ),
    Trial(
        "slow-clients",
        "slow clients: half a header, half a body, one byte per second, disconnected",
        "silent clients are disconnected; the p99 of other clients is less than doubled",
        slow_clients,
    ),
)
