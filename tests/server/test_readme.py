"""Run the commands in the console blocks of the documents, and compare the answers with the printed ones.

`unit/test_documents.py` checks the links and the names of the make commands on every page.
"""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest

from tests.server.place import Place
from tests.shipped import SHIPPED
from tests.unit.test_documents import pages

ROOT = Path(__file__).resolve().parents[2]
README = "README.md"
# the least number of commands that each page has, and the fixture of the server for them
PAGES = {README: (11, "served"), "docs/operations.md": (9, "served"), "models/README.md": (4, "served_on_request")}
DEFAULT_PORTS = {
    "inference_address": 8080,
    "management_address": 8081,
    "metrics_address": 8082,
    "grpc_inference_port": 7070,
}


def read(page: str) -> str:
    return (ROOT / page).read_text()


def examples(page: str) -> list[tuple[str, str]]:
    """Return (command, output) of every `$ ` line in a page's console blocks, in their order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", read(page), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", "").partition("\n")
            found.append((command.strip(), output.strip()))
    return found


@pytest.mark.parametrize("model", SHIPPED)
def test_accuracy_in_the_readme_is_the_measured_one(model):
    accuracy = json.loads((ROOT / "models" / model / "metrics.json").read_text())["accuracy"]
    assert re.search(rf"^\| `{model}` .* {100 * accuracy:.2f} % ", read(README), re.MULTILINE)


def test_every_page_with_console_examples_is_run():
    names = [page.relative_to(ROOT).as_posix() for page in pages()]
    assert {name for name in names if examples(name)} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_examples_answer_as_printed(request: pytest.FixtureRequest, page: str):
    """One test a page, because its commands build on one another: what is registered is scaled, then removed."""
    least, server = PAGES[page]
    place = request.getfixturevalue(server)
    commands = [(command, output) for command, output in examples(page) if not command.startswith("make ")]
    assert len(commands) >= least
    for command, output in commands:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", on_ports_of(place, command)],
            cwd=ROOT,
            env=place.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, f"{command}\n{run.stderr}"
        assert_like(run.stdout.strip(), output, command)


def on_ports_of(place: Place, command: str) -> str:
    for key, port in DEFAULT_PORTS.items():
        command = command.replace(f":{port}", f":{place.ports[key]}")
    return command.replace("curl ", "curl --silent --show-error ")


def assert_like(got: str, printed: str, command: str) -> None:
    """Compare as JSON, with a tolerance for numbers, or as text. A printed "..." stands for any output."""
    if printed == "...":
        assert got, command
        return
    try:
        expected = json.loads(printed)
    except ValueError:
        assert got == printed, command
        return
    assert alike(json.loads(got), expected), f"{command}\n{got}\nis not as printed:\n{printed}"


def alike(got: object, expected: object) -> bool:
    if isinstance(expected, float):
        return isinstance(got, (int, float)) and math.isclose(got, expected, rel_tol=0.01, abs_tol=0.01)
    if isinstance(expected, dict):
        return isinstance(got, dict) and got.keys() == expected.keys() and all(alike(got[k], expected[k]) for k in got)
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(alike, got, expected))
    return got == expected


@pytest.mark.parametrize(("got", "expected"), [(1.5, 1.6), ({"a": 1}, {"a": 2}), ([1], [1, 2]), ({}, {"a": 1})])
def test_alike_with_different_values_is_false(got, expected):
    assert not alike(got, expected)
