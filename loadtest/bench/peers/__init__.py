"""The same pipeline behind each peer: what runs in the peer's own environment.

    python -m loadtest.bench.peers.NAME PORT CASE

Each peer runs with batching on, one worker for each core and one torch thread in each, except where trying another
number of workers was faster (lit.py says where). One worker with two threads was tried for photographs with LitServe
and BentoML, and was slower. Batch sizes and delays are the bundle's own, or near it; they were not tuned for each peer.
"""

import os

BATCH_SIZES = {"mnist": 32, "text": 32, "audio": 16, "photo": 8, "photo-12mp": 8}  # by case
DELAY = 0.002  # s that a batch waits to fill


def workers() -> int:
    """One for each core."""
    return len(os.sched_getaffinity(0))
