"""The reference pipeline behind each peer. These modules run in the peers' own environments.

    python -m loadtest.bench.peers.NAME PORT CASE BATCH_SIZE DELAY_MS

Each peer batches, and runs one worker with one torch thread for each core, except where another number of workers was
faster (see lit.py). For photographs, LitServe and BentoML were slower with one worker of two threads. Batch size and
delay are those of the bundle's model folder; they were not tuned for each peer, except for the fastest (see mos.py).
"""

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """The task of a peer.

    Attributes:
        port: port of 127.0.0.1.
        case: name of the case to serve.
        batch_size: maximum number of requests in a batch.
        delay: maximum wait for a batch to fill, in seconds.
    """

    port: int
    case: str
    batch_size: int
    delay: float


def task() -> Task:
    """Read the task from the command line.

    The batch size is at least 2 (LitServe, BentoML) and the delay at least 1 ms (MLServer), because these peers turn
    batching off below.
    """
    port, case, batch_size, delay = sys.argv[1:]
    return Task(int(port), case, max(2, int(batch_size)), max(1, int(delay)) / 1000)


def workers() -> int:
    """Return the number of workers: one for each core."""
    return len(os.sched_getaffinity(0))
