"""Why a worker does not start: the author's exception, as the logs of a real server have it."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from bundle.server.readiness import worker_failure
from tests.server.place import Place
from tests.support import wait_for

HANDLERS = {
    "raises": (
        "from ts.torch_handler.base_handler import BaseHandler\n\n\nclass Handler(BaseHandler):\n"
        "    def initialize(self, context):\n        raise RuntimeError('my bug')\n",
        "RuntimeError: my bug (handler.py, line 6)",
    ),
    "missing": (
        "import torch\nimport nosuchpackage\n",
        "ModuleNotFoundError: No module named 'nosuchpackage' (handler.py, line 2)",
    ),
    "wrong_name": ("\n\nfrom torch import nosuchname\n", "(handler.py, line 3)"),
    "syntax": ("def handle(data, context)\n", "SyntaxError: expected ':' (handler.py, line 1)"),
    "two": ("class One:\n    pass\n\n\nclass Two:\n    pass\n", "ValueError: Expected only one class"),
    "chained": (
        "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('bad settings') from error\n",
        "ValueError: bad settings (handler.py, line 4)",
    ),
}


@pytest.fixture
def archive(served: Place) -> Iterator:
    """A function that writes the archive of a handler into the server's store; afterwards, they are removed."""
    made: list[Path] = []

    def write(name: str, code: str, version: str = "1.0") -> str:
        model = {"modelName": name, "handler": "handler.py", "modelVersion": version, "configFile": "model-config.yaml"}
        made.append(served.store / f"{name}-{version}.mar")
        with zipfile.ZipFile(made[-1], "w") as file:
            file.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
            file.writestr("handler.py", code)
            file.writestr(
                "model-config.yaml", "minWorkers: 1\nmaxWorkers: 1\nresponseTimeout: 60\nstartupTimeout: 60\n"
            )
        return made[-1].name

    yield write
    for file in made:
        file.unlink()


@pytest.mark.parametrize("name", HANDLERS)
def test_reason_of_a_failed_start_is_the_authors_exception_with_its_file_and_line(served: Place, archive, name: str):
    code, cause = HANDLERS[name]
    url = archive(name, code)
    answer = requests.post(
        f"{served.client.management}/models", params={"url": url, "synchronous": "true"}, timeout=120
    )
    assert answer.status_code == 500, answer.text
    wait_for(lambda: cause in str(worker_failure(served.logs, name)), 20)
    wait_for(lambda: name not in served.client.models(), 20)
