"""The page as the Docker stack runs it, behind a proxy: its path, the names that it knows, and people's own keys."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from bundle.catalog import select
from bundle.paths import ROOT
from bundle.server.ports import free_ports
from tests.server.place import Place, new_place, serving
from tests.visitor import CHROMIUM, SECONDS, Visitor, launched

PYTHON = ROOT / ".venv-page" / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(not PYTHON.exists(), reason="the page's environment is missing: make .venv-page/page.done"),
]


@pytest.fixture(scope="module")
def guarded(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server that requires keys."""
    folder = tmp_path_factory.mktemp("guarded")
    place = new_place(folder / "run", shutil.copytree(archives, folder / "store"))
    place.environment["TS_DISABLE_TOKEN_AUTHORIZATION"] = "false"
    with serving(place, "text"):
        yield place


@pytest.fixture(scope="module")
def url(guarded: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of that server, which is asked without a proxy in front of it."""
    [port] = free_ports(1)
    command = [PYTHON, "-P", "-m", "page", "--proxy", guarded.client.inference, "--port", str(port)]
    command += ["--names", "models.example other.example", "--files", tmp_path_factory.mktemp("page")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"The page is at http://127.0.0.1:{port}/page (Ctrl-C ends it).\n"
        yield f"http://127.0.0.1:{port}/page/"
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)


def test_person_types_in_the_key_that_the_server_requires(guarded: Place, url: str):
    key = guarded.client.keys.header("inference").removeprefix("Bearer ")
    with launched() as browser:
        visitor = Visitor(browser, url)
        problem, field = visitor.tab.locator("#problem"), visitor.tab.locator("#key input")
        for typed, said in ((None, "The server requires a key."), ("AAAAAAAA", "The server does not accept this key.")):
            if typed:
                field.fill(typed)
                field.press("Enter")
            problem.get_by_text(said).wait_for()
        field.fill(f" {key} ")
        field.press("Enter")
        problem.wait_for(state="detached")
        visitor.choose("text")
        assert "Explained in" in visitor.ask()
        visitor.shoot("keyed")
        assert select(["text"])[0].bundle.expect in visitor.bars()[0]
        curl = visitor.snippet("curl")
        assert '-H "Authorization: Bearer $TORCHSERVE_KEY"' in curl
        assert f"{url.removesuffix('/page/')}/predictions/text" in curl
        assert key not in visitor.tab.content()
        another = Visitor(browser, url)  # the key is that of one visit
        another.tab.locator("#problem").get_by_text("The server requires a key.").wait_for()
        renew(guarded)
        visitor.part("ask").click()
        visitor.said(expected=re.escape("The server requires a new key. Reload the page, and type it in."))
        assert visitor.problems == another.problems == []
        assert [address for address in visitor.asked_for if not address.startswith((url, "data:", "blob:"))] == []


def renew(guarded: Place) -> None:
    """Make the inference key of a server invalid, as it is after its time."""
    headers = {"Authorization": f"Bearer {json.loads(guarded.keys.read_text())['API']['key']}"}
    answer = requests.get(f"{guarded.client.management}/token", {"type": "inference"}, headers=headers, timeout=30)
    assert answer.ok, answer.text


def root_of(url: str, host: str, **headers: str) -> str | None:
    """Return the address that the page gives itself if it is asked under a name; None if it rejects the name."""
    answer = requests.get(f"{url}config", headers={"Host": host, **headers}, timeout=30)
    return answer.json()["root"] if answer.ok else None


def test_page_answers_under_addresses_and_known_names(url: str):
    for host in ("localhost:8080", "10.0.0.5:8080", "models.example", "other.example:8080"):
        assert root_of(url, host) == f"http://{host}/page"
    assert root_of(url, "elsewhere.example") is None
    by_tls = {"X-Forwarded-Proto": "https"}
    assert root_of(url, "models.example:8443", **by_tls) == "https://models.example:8443/page"
    assert root_of(url, "elsewhere.example:8443", **by_tls) is None
