"""What bundle/guard.py starts: a command that it permits, in an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bundle import guard
from bundle.server.frontend import OPTIONS, with_agent

GUARD = Path(guard.__file__)
PRINTS = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("options", [None, "-Xss2m", '"-javaagent:of the user.jar" -Xss2m'])
def test_java_that_a_command_starts_has_the_users_options_without_the_agent(options: str | None):
    own = {name: value for name, value in os.environ.items() if name != OPTIONS}
    own |= {OPTIONS: options} if options else {}
    started = subprocess.run(
        [sys.executable, GUARD, "python", "-c", PRINTS],  # in TorchServe's folder, as its metrics collector
        env={**with_agent(own), "BUNDLE_PYTHON": sys.executable},
        cwd=guard.torchserve(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(started.stdout).get(OPTIONS) == options
