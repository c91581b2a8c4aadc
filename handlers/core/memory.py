"""Memory that a worker has used once stays its own."""

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# bytes: the tensors of a batch, not the 16 MiB blocks that Pillow unpacks photographs into
LARGEST_FROM_HEAP = 12 << 20
# bytes that may be free at the top of a heap before they go back to the system; what is free further down stays anyway
KEPT_FREE = 64 << 20


def keep_freed_memory() -> None:
    """Has glibc keep what a batch has freed for the next one.

    It would give large blocks back to the system at once, and the next batch would page them in again, zeroed: a third
    of the time of a worker that computes MFCC (BENCHMARKS.md). Where the C library is another, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
    mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def settle() -> None:
    """Takes all that is there now for permanent: a full collection would walk the hundred thousands of objects that
    importing torch makes, for 0.2 s, in a request's way."""
    gc.collect()
    gc.freeze()
