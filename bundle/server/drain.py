"""Waits until nothing is in flight, so that what is ended afterwards loses no request."""

import time

import psutil
import requests

from bundle.errors import BundleError
from bundle.server.client import Client

POLL_SECONDS = 0.5  # on a GPU, each description runs nvidia-smi


def wait_until_idle(client: Client, versions: list[tuple[str, str]], ports: set[int], seconds: float) -> None:
    """Returns when no request of these versions waits in a queue or is with a worker.

    TorchServe says what is queued, and not what a worker is at. So, once the queues are empty, one of two proofs is
    waited for: a moment in which no client is connected (nginx closes idle connections after 2 s), or the end of the
    longest responseTimeout, by which TorchServe itself would have ended the request.

    Args:
        versions: name and version of each.
        ports: where clients connect: inference over HTTP and gRPC.
        seconds: to wait at most.

    Raises:
        BundleError: the time is over, and requests may be in flight.
    """
    deadline = time.monotonic() + seconds
    emptied = None  # since when the queues are empty
    longest = 0  # responseTimeout, s
    waiting = "an unknown number of"
    while time.monotonic() < deadline:
        try:
            described = [found for name, version in versions if (found := client.describe(name, version))]
        except requests.RequestException:
            time.sleep(POLL_SECONDS)  # a busy server may miss a poll
            continue
        longest = max([longest, *(version["responseTimeout"] for version in described)])
        waiting = sum(version["jobQueueStatus"]["pendingRequests"] for version in described)
        if waiting:
            emptied = None
        elif not connections(ports):
            return
        else:
            emptied = emptied or time.monotonic()
            if time.monotonic() - emptied > longest:
                return
        time.sleep(POLL_SECONDS)
    raise BundleError(f"After {seconds:.0f} s there are still {waiting} requests waiting, or with a worker.")


def connections(ports: set[int]) -> int:
    """How many clients are connected to these ports of this machine."""
    found = psutil.net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port in ports for c in found)
