"""`make status`: the memory of a server's processes."""

import multiprocessing
import os
import time

import psutil
import pytest

from bundle.server.status import memory

SIZE = 2**26
CHILDREN = 3


@pytest.fixture
def family():
    """This process and children that share pages with it, as the workers share torch's libraries."""
    kept = bytearray(os.urandom(SIZE))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=time.sleep, args=(600,)) for _ in range(CHILDREN)]
    for child in children:
        child.start()
    yield [psutil.Process(), *(psutil.Process(child.pid) for child in children)]
    for child in children:
        child.kill()
        child.join()
    assert len(kept) == SIZE


def resident(family: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in family)


def test_memory_counts_shared_pages_once(family: list[psutil.Process]):
    found, kind = memory(family)
    assert kind == "PSS"
    assert SIZE < found < resident(family) - (CHILDREN - 1) * SIZE


def test_memory_of_a_process_that_has_ended_is_nothing(family: list[psutil.Process]):
    ended = family[-1]
    ended.kill()
    ended.wait()
    assert memory([ended]) == (0, "PSS")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_memory_of_another_users_processes_is_resident(family: list[psutil.Process]):
    def measure() -> None:
        os.setuid(65534)
        writer.send(memory(family))

    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    other = context.Process(target=measure)
    other.start()
    writer.close()  # so that the end of the other process is the end of the pipe
    assert reader.poll(20)
    measured, kind = reader.recv()
    other.join()
    assert kind == "RSS"
    assert measured == pytest.approx(resident(family), rel=0.1)
