"""Find free ports."""

import itertools
import os
import socket

# Linux gives ports from 32768 on to outgoing connections: one of those could be taken before a server listens on it.
PORTS = range(10240, 32768)

# Each process begins elsewhere, and goes on from there. Two that look at the same time would otherwise find the same
# ports, because neither listens yet.
_candidates = itertools.count(os.getpid() * 2003)


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of the loopback interface that are free now."""
    return list(itertools.islice(filter(is_free, (PORTS[number % len(PORTS)] for number in _candidates)), count))


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port of the loopback interface."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
