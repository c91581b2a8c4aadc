"""CPU time and memory of all processes of a server, and the CPU time of everything else on the machine."""

import resource
import time
from collections.abc import Callable

import psutil


def processes(roots: tuple[int, ...]) -> list[psutil.Process]:
    """Return the processes with these PIDs and all their descendants."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        try:
            root = psutil.Process(pid)
            found |= {process.pid: process for process in (root, *root.children(recursive=True))}
        except psutil.NoSuchProcess:
            pass
    return list(found.values())


def total(roots: tuple[int, ...], read: Callable[[psutil.Process], float]) -> float:
    """Sum a value over all processes of a server."""
    result = 0.0
    for process in processes(roots):
        try:
            result += read(process)
        except psutil.Error:
            pass  # the process has ended, or belongs to another user
    return result


def cpu_seconds(roots: tuple[int, ...]) -> float:
    """Return the user and system time of the processes since their start, including that of ended children."""

    def read(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    return total(roots, read)


def memory(roots: tuple[int, ...]) -> int:
    """Return the memory in bytes. A page that several processes share is counted once (proportional set size)."""
    return int(total(roots, lambda process: process.memory_full_info().pss))


class Meter:
    """A meter of CPU time since its creation.

    Args:
        roots: PIDs of the server's root processes.
    """

    def __init__(self, roots: tuple[int, ...]):
        self.roots = roots
        self.begin = self.now()

    def now(self) -> tuple[float, float, float, float]:
        """Return seconds of the clock, and seconds of CPU time of the server, of this process and of the machine.

        The time of this process includes that of its ended children.
        """
        mine = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # already counted in user and nice
        return time.monotonic(), cpu_seconds(self.roots), mine, sum(times) - guests - idle

    def read(self) -> tuple[float, float]:
        """Return the server's CPU seconds, and the share of the machine's CPU that neither it nor the client used."""
        clock, server, mine, machine = (end - begin for begin, end in zip(self.begin, self.now(), strict=True))
        return server, max(0.0, machine - server - mine) / (clock * (psutil.cpu_count() or 1))
