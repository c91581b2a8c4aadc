"""CPU time and memory of a server: of all its processes. And what everything else on the machine used meanwhile."""

import resource
import time
from collections.abc import Callable

import psutil


def processes(roots: tuple[int, ...]) -> list[psutil.Process]:
    """The processes with these PIDs and all below them."""
    found = {}
    for pid in roots:
        try:
            root = psutil.Process(pid)
            found |= {process.pid: process for process in (root, *root.children(recursive=True))}
        except psutil.NoSuchProcess:
            pass
    return list(found.values())


def total(roots: tuple[int, ...], read: Callable[[psutil.Process], float]) -> float:
    sum_ = 0.0
    for process in processes(roots):
        try:
            sum_ += read(process)
        except psutil.Error:
            pass  # it has ended, or is not ours to look at
    return sum_


def cpu_seconds(roots: tuple[int, ...]) -> float:
    """User and system time since they started, that of their ended children included."""

    def read(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    return total(roots, read)


def memory(roots: tuple[int, ...]) -> int:
    """Bytes of memory. A page that several processes share counts as one (proportional set size)."""
    return int(total(roots, lambda process: process.memory_full_info().pss))


class Meter:
    """CPU time from here on.

    Args:
        roots: the server's processes.
    """

    def __init__(self, roots: tuple[int, ...]):
        self.roots = roots
        self.begin = self.now()

    def now(self) -> tuple[float, float, float, float]:
        """Seconds: on the clock; CPU time of the server, of this process and its ended children, of the machine."""
        mine = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # user and nice count them, too
        return time.monotonic(), cpu_seconds(self.roots), mine, sum(times) - guests - idle

    def read(self) -> tuple[float, float]:
        """CPU seconds of the server, and the share of the machine's CPU that neither it nor the client used."""
        clock, server, mine, machine = (end - begin for begin, end in zip(self.begin, self.now(), strict=True))
        return server, max(0.0, machine - server - mine) / (clock * (psutil.cpu_count() or 1))
