"""Memory of a worker: keep what the next batch needs, and return the rest to the system."""

import ctypes
import gc
import time

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
# bytes: more than the tensors of a batch, less than the 16 MiB blocks that Pillow decodes photographs into
LARGEST_FROM_HEAP = 12 << 20
KEPT_FREE = 64 << 20  # free bytes at the top of the heap that are not returned to the system
TRIM_SECONDS = 10.0
trimmed = time.monotonic()  # when `trim` last returned memory


def keep_freed_memory() -> None:
    """Make glibc keep the memory that a batch frees, for the next batch.

    By default it returns large blocks to the system at once, and the system maps and zeroes them again for the next
    batch: a third of the time of a worker that computes MFCC (BENCHMARKS.md). Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
    mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def trim() -> None:
    """Return free memory below the top of the heap, at most every ten seconds; glibc does not do so by itself.

    Inputs of different sizes leave holes: workers that got broken sounds of up to 16 MiB grew by a third in ten
    minutes.
    """
    global trimmed
    if time.monotonic() - trimmed < TRIM_SECONDS:
        return
    try:
        ctypes.CDLL(None).malloc_trim(KEPT_FREE)
    except (OSError, AttributeError):
        pass
    trimmed = time.monotonic()


def freeze_objects() -> None:
    """Exempt all present objects from garbage collection.

    Importing torch creates hundreds of thousands of objects. A full collection visits them all, which would delay a
    request by 0.2 s.
    """
    gc.collect()
    gc.freeze()
