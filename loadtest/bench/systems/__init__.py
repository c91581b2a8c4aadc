"""The systems that are compared, by name."""

from loadtest.bench.systems.base import Endpoint, System
from loadtest.bench.systems.bundle import Bundle, Floor
from loadtest.bench.systems.peers import PEERS
from loadtest.bench.systems.torchserve import TORCHSERVES

_SYSTEMS: tuple[System, ...] = (Bundle(), Floor(), *TORCHSERVES, *PEERS)
SYSTEMS = {system.name: system for system in _SYSTEMS}

__all__ = ["SYSTEMS", "Endpoint", "System"]
