"""Memory that a worker has used once stays its own, and what it does not need goes back."""

import ctypes
import gc
import time

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# bytes: the tensors of a batch, not the 16 MiB blocks that Pillow unpacks photographs into
LARGEST_FROM_HEAP = 12 << 20
KEPT_FREE = 64 << 20  # bytes that may be free at the top of a heap before they go back to the system
TRIM_SECONDS = 10.0
trimmed = time.monotonic()  # when it was last done


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


def trim() -> None:
    """Gives back, every ten seconds at most, what is free below the top of the heap, which glibc does not do by itself.

    Inputs of all sizes leave holes: workers that got broken sounds of up to 16 MiB grew by a third in ten minutes.
    """
    global trimmed
    if time.monotonic() - trimmed < TRIM_SECONDS:
        return
    try:
        ctypes.CDLL(None).malloc_trim(KEPT_FREE)
    except (OSError, AttributeError):
        pass
    trimmed = time.monotonic()


def settle() -> None:
    """Takes all that is there now for permanent: a full collection would walk the hundred thousands of objects that
    importing torch makes, for 0.2 s, in a request's way.
    """
    gc.collect()
    gc.freeze()
