"""Load a server with wrk and the scripts in `wrk/`, and measure what its clients see.

A closed loop measures how much a server can do: each client waits for its answer before it sends the next request.
An open loop measures the latency at a given rate: requests come at random times, whether or not the server keeps up.
Latency counts from the time when a request was due, so the requests that a stalled server keeps waiting count, too.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import BundleError
from bundle.server.http import check_certificate

SCRIPTS = Path(__file__).parent / "wrk"
SEED = 1  # of an open loop's random times, by default the same for all runs, so that they can be compared
RESULT = "LOAD "  # the beginning of the line that a script prints
ENOUGH = 10  # answers of each client after which the exact end of a run hardly matters
THREADS = 2  # of a closed loop


@dataclass(frozen=True)
class LoadResult:
    """What the clients of one run saw.

    Attributes:
        seconds: how long requests were sent.
        answered: number of good answers (2xx).
        failed: number of requests with another status, without an answer in time, or with a broken connection.
        throughput: good answers a second.
        p50, p95, p99, longest: latency in seconds; of good answers in an open loop, of all answers in a closed one;
            infinite if no answer was good.
    """

    seconds: float
    answered: int
    failed: int
    throughput: float
    p50: float
    p95: float
    p99: float
    longest: float


def closed_loop(
    url: str, body: bytes, headers: dict[str, str], concurrency: int, seconds: float, timeout: float = 10.0
) -> LoadResult:
    """Send requests from clients that wait for their answers.

    Args:
        url: where to POST.
        body: what to POST.
        headers: in addition to Host and Content-Length.
        concurrency: number of clients.
        seconds: how long they send. They then wait for the answers to requests in flight.
        timeout: seconds after which an unanswered request has failed.

    Raises:
        BundleError: an argument is invalid, wrk is missing, or it cannot connect.
    """
    check(concurrency >= 1, f"The number of clients is {concurrency}, and must be at least 1.")
    threads = THREADS if concurrency % THREADS == 0 else 1  # wrk gives each thread the same number of connections
    return run_wrk("closed.lua", url, body, headers, concurrency, threads, seconds, timeout)


def open_loop(
    url: str,
    body: bytes,
    headers: dict[str, str],
    rate: float,
    seconds: float,
    connections: int = 64,
    timeout: float = 10.0,
    seed: int = SEED,
) -> LoadResult:
    """Send requests at random times (Poisson arrivals).

    Args:
        url, body, headers, timeout: see `closed_loop`.
        rate: requests a second, on average.
        seconds: how long to send.
        connections: the most requests in flight. Further requests wait in the client; their latency counts from the
            time when they were due.
        seed: of the random times.

    Raises:
        BundleError: see `closed_loop`.
    """
    check(rate > 0, f"The rate is {rate:g} requests a second, and must be above 0.")
    check(connections >= 1, f"The number of connections is {connections}, and must be at least 1.")
    settings = {"RATE": rate, "CONNECTIONS": connections, "SEED": seed}
    return run_wrk("open.lua", url, body, headers, 1, 1, seconds, timeout, settings)


def wrk() -> str:
    """Return the path of the load generator wrk.

    Raises:
        BundleError: it is not installed.
    """
    path = shutil.which("wrk")
    if path is None:
        raise BundleError("The load generator wrk is missing. Install it: apt-get install wrk, or brew install wrk.")
    return path


def check(valid: bool, message: str) -> None:
    """Check an argument.

    Raises:
        BundleError: with this message; the argument is invalid.
    """
    if not valid:
        raise BundleError(message)


def run_wrk(
    script: str,
    url: str,
    body: bytes,
    headers: dict[str, str],
    clients: int,
    threads: int,
    seconds: float,
    timeout: float,
    settings: dict[str, float] | None = None,
) -> LoadResult:
    """Run wrk with a script, and return its result.

    Args:
        script: in `wrk/`.
        settings: further environment variables of the script, without LOAD_.

    Raises:
        BundleError: an argument is invalid, wrk is missing, did not end, or could not connect; or the server's
            certificate is not trusted.
    """
    check(seconds > 0, f"The duration is {seconds:g} seconds, and must be above 0.")
    check_certificate(url)  # wrk itself trusts every server
    limit = math.ceil(seconds + timeout + 1)  # the script ends wrk as soon as no request is in flight
    command = [wrk(), f"--threads={threads}", f"--connections={clients}", f"--duration={limit}s"]
    command += [f"--timeout={math.ceil(timeout)}s", f"--script={SCRIPTS / script}"]
    command += [argument for name, value in headers.items() for argument in ("--header", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile(prefix="load-") as file:
        file.write(body)
        file.flush()
        values = {"BODY": file.name, "CLIENTS": clients, "THREADS": threads, "SECONDS": seconds, "TIMEOUT": timeout}
        values |= settings or {}
        environment = os.environ | {f"LOAD_{name}": str(value) for name, value in values.items()}
        try:
            ended = subprocess.run(
                [*command, url], env=environment, capture_output=True, text=True, timeout=limit + 60, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise BundleError(
                f"wrk did not end within {limit + 60} seconds. The machine may be overloaded: retry with fewer clients."
            ) from exc
    results = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        raise BundleError(
            f"wrk could not send requests to {url}. Is the server running?", (ended.stdout + ended.stderr).strip()
        )
    return parse_result(json.loads(results[-1].removeprefix(RESULT)), clients, seconds)


def parse_result(seen: dict[str, float], clients: int, seconds: float) -> LoadResult:
    """Return the result that a script printed."""
    answered = int(seen["answered"])
    if seen["in_time"] >= ENOUGH * clients:
        throughput = seen["in_time"] / seconds
    else:  # with so few answers, one more within the time would change the rate: count until the last answer
        throughput = answered / max(seconds, seen["last"])
    latencies = {name: seen.get(name, math.inf) if answered else math.inf for name in ("p50", "p95", "p99", "longest")}
    return LoadResult(seconds, answered, int(seen["failed"]), throughput, **latencies)
