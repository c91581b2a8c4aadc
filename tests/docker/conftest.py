"""Fixtures: the stack, and the proxy alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.proxy import engine, fresh, proxy, start, supervisor, upstream  # noqa: F401 - fixtures
from tests.docker.stack import SERVICES, UNLIMITED, Stack, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """A healthy stack. All tests share it; a test must undo its changes."""
    with running(SERVICES, MAX_BODY="20m", **UNLIMITED) as stack:
        yield stack
