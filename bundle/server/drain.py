"""Wait until no requests are in flight, so that ending workers loses none."""

import time

import psutil
import requests

from bundle.errors import BundleError
from bundle.server.client import Client

POLL_SECONDS = 0.5  # on a GPU, each description runs nvidia-smi


def wait_until_idle(client: Client, versions: list[tuple[str, str]], ports: set[int], seconds: float) -> None:
    """Wait until no request of these versions is queued or processed by a worker.

    TorchServe reports what is queued, but not what its workers process. So, once the queues are empty, this waits until
    no client is connected (nginx closes idle connections after 2 s), or until the longest responseTimeout has passed,
    after which TorchServe itself ends a request.

    Args:
        versions: name and version of each.
        ports: where clients connect: inference over HTTP and gRPC.
        seconds: to wait at most.

    Raises:
        BundleError: timed out; requests may be in flight.
    """
    deadline = time.monotonic() + seconds
    emptied = None  # when the queues became empty
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
    raise BundleError(f"After {seconds:.0f} s, {waiting} requests are still queued, or workers are still busy.")


def connections(ports: set[int]) -> int:
    """Count the clients that are connected to these ports of this machine."""
    found = psutil.net_connections("tcp")
    return sum(bool(c.status == psutil.CONN_ESTABLISHED and c.laddr and c.laddr.port in ports) for c in found)
