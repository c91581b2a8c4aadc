"""One stack for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.proxy import engine, fresh, proxy, start, supervisor, upstream  # noqa: F401 - fixtures
from tests.docker.stack import Stack, running

SERVICES = ("torchserve", "proxy", "prometheus")  # Grafana's image has no stand-in where nothing can be pulled
UNLIMITED = {"PROXY_RATE": "10000r/s", "BURST": "10000"}  # test_proxy_limits.py tries the limits


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The stack, healthy; a test leaves it so."""
    with running(SERVICES, **UNLIMITED) as stack:
        yield stack
