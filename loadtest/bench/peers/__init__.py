"""The same pipeline behind each peer: what runs in the peer's own environment.

    python -m loadtest.bench.peers.NAME PORT CASE BATCH_SIZE DELAY_MS

Each peer runs with batching on, one worker for each core and one torch thread in each, except where trying another
number of workers was faster (lit.py says where). One worker with two threads was tried for photographs with LitServe
and BentoML, and was slower. Batch size and delay are those of the bundle's model folder, by the command line; they were
not tuned for each peer.
"""

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a peer is to serve.

    Attributes:
        batch_size: requests, at most.
        delay: s that a batch waits to fill.
    """

    port: int
    case: str
    batch_size: int
    delay: float


def task() -> Task:
    """What the command line says, and at least what leaves batching on: two requests (LitServe, BentoML), 1 ms
    (MLServer).
    """
    port, case, batch_size, delay = sys.argv[1:]
    return Task(int(port), case, max(2, int(batch_size)), max(1, int(delay)) / 1000)


def workers() -> int:
    """One for each core."""
    return len(os.sched_getaffinity(0))
