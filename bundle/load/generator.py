"""Load on a server, and what its clients saw: wrk, driven by the scripts in `wrk/`.

A closed loop asks how much a server can do: so many clients, each waiting for its answer before it asks again.
An open loop asks how it feels at a given rate: requests come at random times whether or not the server keeps up, and
latency counts from when a request was due, so that a server which stalls is not spared the requests it kept waiting.
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

SCRIPTS = Path(__file__).parent / "wrk"
SEED = 1  # of the open loop's arrivals: the same for everything that is compared
RESULT = "LOAD "  # starts the line that a script prints
ENOUGH = 10  # answers a client, from which on it matters little where the end of a run falls
THREADS = 2  # of a closed loop


@dataclass(frozen=True)
class Load:
    """What one run of the client saw.

    Attributes:
        seconds: how long requests were sent.
        answered: good answers (2xx).
        failed: requests with another status, without an answer in time, or whose connection broke.
        throughput: good answers a second.
        p50, p95, p99, longest: latency in seconds, of the good answers in an open loop, of all answers in a closed one;
            infinite where no answer was good.
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
) -> Load:
    """Clients that wait for their answers.

    Args:
        url: where to POST.
        body: what to POST.
        headers: beside Host and Content-Length.
        concurrency: how many clients.
        seconds: how long they send. They then wait for what is on its way.
        timeout: seconds after which an unanswered request has failed.

    Raises:
        BundleError: wrk is missing, or cannot connect.
    """
    check(concurrency >= 1, f"A closed loop needs at least one client, not {concurrency}.")
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
) -> Load:
    """Requests at random times (Poisson arrivals), `rate` a second; as `closed_loop` otherwise.

    Args:
        connections: how many requests can be on their way. With more than that the next waits in the client; its
            latency counts from when it was due.
    """
    check(rate > 0, f"An open loop needs a rate above 0, not {rate:g} requests a second.")
    check(connections >= 1, f"An open loop needs at least one connection, not {connections}.")
    return run_wrk("open.lua", url, body, headers, connections, connections, seconds, timeout, {"RATE": rate})


def wrk() -> str:
    """The path of the load generator.

    Raises:
        BundleError: it is not installed.
    """
    path = shutil.which("wrk")
    if path is None:
        raise BundleError("wrk, the load generator, is missing: apt-get install wrk, or brew install wrk.")
    return path


def check(condition: bool, complaint: str) -> None:
    if not condition:
        raise BundleError(complaint)


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
) -> Load:
    check(seconds > 0, f"Load takes time: more than {seconds:g} seconds.")
    limit = math.ceil(seconds + timeout + 1)  # the script ends wrk as soon as nothing is on its way any more
    command = [wrk(), f"--threads={threads}", f"--connections={clients}", f"--duration={limit}s"]
    command += [f"--timeout={math.ceil(timeout)}s", f"--script={SCRIPTS / script}"]
    command += [argument for name, value in headers.items() for argument in ("--header", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile(prefix="load-") as file:
        file.write(body)
        file.flush()
        said = {"BODY": file.name, "CLIENTS": clients, "THREADS": threads, "SECONDS": seconds, "TIMEOUT": timeout}
        said |= {"SEED": SEED, **(settings or {})}
        environment = os.environ | {f"LOAD_{name}": str(value) for name, value in said.items()}
        try:
            ended = subprocess.run(
                [*command, url], env=environment, capture_output=True, text=True, timeout=limit + 60, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise BundleError(f"wrk did not end within {limit + 60} seconds.") from exc
    results = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        raise BundleError(f"wrk could not load {url}.", (ended.stdout + ended.stderr).strip())
    return as_load(json.loads(results[-1].removeprefix(RESULT)), clients, seconds)


def as_load(seen: dict[str, float], clients: int, seconds: float) -> Load:
    """What a script printed, as a Load."""
    answered = int(seen["answered"])
    if seen["in_time"] >= ENOUGH * clients:
        throughput = seen["in_time"] / seconds
    else:  # so few that one more or less within the time would tell: the last is waited for
        throughput = answered / max(seconds, seen["last"])
    latencies = {name: seen.get(name, math.inf) if answered else math.inf for name in ("p50", "p95", "p99", "longest")}
    return Load(seconds, answered, int(seen["failed"]), throughput, **latencies)
