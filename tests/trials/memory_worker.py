"""Be one worker, and write its memory to the standard output; tests/trials/memory.py starts it.

python -m tests.trials.memory_worker ARCHIVE BATCH_SIZE HEADERS < SAMPLE

It imports nothing that a worker of TorchServe does not need, because its memory is what is measured.
"""

import ctypes
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import psutil
import ts.model_service_worker  # noqa: F401  # what a real worker imports before its handler

from bundle.build.dryrun import DryRun

BATCHES = 5  # of each size: the first ones compile


def resident() -> int:
    """Return the bytes of this process's resident memory, without pages of files."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared


def measure(file: Path, size: int, headers: dict[str, str], content: bytes) -> list[int]:
    """Return the bytes of a worker in the order of `memory.Memory`.

    Raises:
        SystemExit: the model does not answer the content.
    """
    found = [resident()]
    with DryRun(file) as worker:
        found.append(resident())
        for requests in (1, size):
            for _ in range(BATCHES):
                for status, body in worker.predict([{"body": content}] * requests, [headers] * requests):
                    if status != 200:
                        raise SystemExit(f"{status} {body}")
            found.append(resident())
        ctypes.CDLL(None).malloc_trim(0)
        found.append(resident())
    return found


if __name__ == "__main__":
    archive, batch_size, headers = sys.argv[1:]
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # a worker prints its metrics
        figures = measure(Path(archive), int(batch_size), json.loads(headers), sys.stdin.buffer.read())
    print(json.dumps(figures))
