"""Fixtures: a release of the chart, and a server of archives beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle.errors import BundleError
from tests.cluster.release import Release, image_to_test, installed

# requests for a small node; limits of rates that the load does not reach
VALUES = """
image: {repository: %s, tag: "%s"}
groups: {main: null, digits: {replicas: 2, models: {mnist: {workers: 1}}}}
defaults: {resources: {requests: {cpu: 200m, memory: 1Gi, ephemeral-storage: 64Mi}}}
proxy: {rate: 10000r/s, burst: 10000}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1800))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to begin if something is missing, once, and not in each test; but let the tests of other folders run."""
    here = Path(__file__).parent
    chosen = bool(session.items) and all(here in item.path.parents for item in session.items)
    if chosen and not session.config.option.collectonly:
        try:
            image_to_test()
        except BundleError as error:
            pytest.exit("\n".join(filter(None, [error.details, f"error: {error}"])), returncode=error.status)


@pytest.fixture(scope="session")
def release() -> Iterator[Release]:
    """Two ready pods of mnist. A test must leave two behind, with these values."""
    try:
        image = image_to_test()
    except BundleError as error:
        pytest.skip(str(error))
    repository, _, tag = image.rpartition(":")
    with installed(image, VALUES % (repository, tag)) as release:
        yield release
