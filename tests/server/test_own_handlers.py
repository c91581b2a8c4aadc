"""Handlers that users bring: upstream's own, metrics of their own, and why they do not start, on a real server."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from bundle import mar
from bundle.server.readiness import worker_failure
from tests.server.place import Place
from tests.support import wait_for
from tests.unit.inputs import encode_image, four_colours
from tests.unit.test_upstream_handlers import Classifier, pack

COUNTS = """
def handle(data, context):
    if data is None:
        return None
    context.metrics.add_counter("my_calls", len(data))
    context.metrics.add_metric("my-invalid-name", 1, unit="count")
    context.metrics.add_time("my_time", 5.0)
    return ["ok"] * len(data)
"""
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


@pytest.mark.parametrize(("name", "version"), [*((name, "1.0") for name in HANDLERS), ("raises", "v2-rc1")])
def test_reason_of_a_failed_start_is_the_authors_exception_with_its_file_and_line(
    served: Place, archive, name: str, version: str
):
    code, cause = HANDLERS[name]
    url = archive(name, code, version)
    answer = requests.post(
        f"{served.client.management}/models", params={"url": url, "synchronous": "true"}, timeout=120
    )
    assert answer.status_code == 500, answer.text
    wait_for(lambda: cause in str(worker_failure(served.logs, name)))
    if name in served.client.models():  # TorchServe keeps it after a RuntimeError, without a worker
        served.client.unregister(name, version)


def register(served: Place, url: str, name: str) -> requests.Response:
    query = {"url": url, "model_name": name, "synchronous": "true"}
    return requests.post(f"{served.client.management}/models", params=query, timeout=120)


def test_metrics_of_a_handler_are_shown_and_an_invalid_one_harms_nothing(served: Place, archive):
    assert register(served, archive("counting", COUNTS), "counting").status_code == 200
    for _ in range(3):
        assert served.client.predict("counting", b"x").status_code == 200

    def exposed() -> str:
        return requests.get(f"{served.url('metrics_address')}/metrics", timeout=20).text

    wait_for(lambda: 'my_calls{ModelName="counting",Level="Model"' in exposed())
    wait_for(lambda: any(line.startswith("my_calls{") and line.endswith(" 3.0") for line in exposed().splitlines()))
    assert 'my_time{ModelName="counting"' in exposed()
    served.client.unregister("counting", "1.0")


def test_archive_of_upstreams_image_classifier_is_served(served: Place, tmp_path: Path):
    made = shutil.move(pack(tmp_path, "image_classifier", Classifier()), served.store / "user.mar")
    try:
        assert register(served, "user.mar", "user").status_code == 200
        answer = served.client.predict("user", encode_image(four_colours(), "PNG"))
        assert (answer.status_code, len(answer.json())) == (200, 5)
        served.client.unregister("user", "1.0")
    finally:
        made.unlink()


def test_folder_in_place_of_an_archive_is_refused_with_what_to_do(served: Place, archive):
    folder = mar.unpack(served.store / archive("folder", COUNTS), served.store / "no-archive")
    try:
        assert register(served, "no-archive", "unpacked").status_code == 500
        wait_for(lambda: "--archive-format no-archive, is not served" in str(worker_failure(served.logs, "unpacked")))
    finally:
        shutil.rmtree(folder)
