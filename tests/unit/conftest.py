"""Settings and fixtures of all unit tests."""

import pytest
from hypothesis import HealthCheck, settings

# no deadlines: a busy machine must not fail a test
settings.register_profile("bundle", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("bundle")

pytest.register_assert_rewrite("tests.unit.workbench", "tests.unit.answering")

from tests.unit.answering import abc, echo, serve_http  # noqa: E402, F401 - fixtures
from tests.unit.numbered import worker  # noqa: E402, F401 - a fixture
from tests.unit.workbench import workbench  # noqa: E402, F401 - a fixture
