"""The systems that are compared, by name."""

from loadtest.bench.systems.base import Endpoint, System
from loadtest.bench.systems.bundle import Bundle
from loadtest.bench.systems.peers import PEERS
from loadtest.bench.systems.torchserve import TORCHSERVES

SYSTEMS: dict[str, System] = {system.name: system for system in (Bundle(), *TORCHSERVES, *PEERS)}

__all__ = ["SYSTEMS", "Endpoint", "System"]
