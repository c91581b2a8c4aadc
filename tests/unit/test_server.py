"""What a server says of itself, without one that runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from bundle.catalog import select
from bundle.server import Running, Server, Settings

FOLDERS = select(["mnist", "text"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.delenv("TS_DISABLE_TOKEN_AUTHORIZATION", raising=False)
    server = Server(tmp_path / "run", Settings(overrides={"model_store": str(tmp_path)}))
    for folder in FOLDERS:
        server.archive(folder).write_bytes(folder.name.encode())
    return server


@pytest.fixture
def running(server: Server) -> Running:
    served, settings = server.wanted(FOLDERS), server.settings.fingerprint()
    return Running(1, 0.0, "", served, settings, "http://a", "http://b", "c")


def test_what_runs_is_what_is_asked_for(server: Server, running: Running):
    assert server.is_current(running, FOLDERS)


def test_why_it_is_not(server: Server, running: Running):
    assert "serves mnist, text, and not mnist." in server.difference(running, FOLDERS[:1])
    assert "other settings" in server.difference(replace(running, settings="others"), FOLDERS)
    server.archive(FOLDERS[1]).write_bytes(b"built again")
    assert "other archives of text." in server.difference(running, FOLDERS)


def test_tokens_that_would_go_unnoticed(server: Server, running: Running):
    assert "IT WILL NOT" in server.difference(replace(running, key_file="/run/key_file.json"), FOLDERS)
