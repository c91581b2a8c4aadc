"""Find free ports."""

import socket


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of the loopback interface that are free now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
