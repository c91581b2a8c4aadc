"""What has changed since a server's start, and whether it must be restarted for it."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from bundle.catalog import select
from bundle.server.process import Running, Server
from bundle.server.restart import restart_reason
from bundle.server.settings import Settings
from tests.unit.processes import isolated

FOLDERS = select(["mnist", "text"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that does not run, and whose store has the archives of two models."""
    monkeypatch.delenv("TS_DISABLE_TOKEN_AUTHORIZATION", raising=False)
    server = isolated(tmp_path)
    for folder in FOLDERS:
        server.archive(folder).write_bytes(folder.name.encode())
    return server


@pytest.fixture
def running(server: Server) -> Running:
    served, settings = server.archive_digests(FOLDERS), server.settings.fingerprint()
    return Running(1, "", "", served, settings, "http://a", "http://b", "c")


def with_settings(server: Server, **changes: str) -> Server:
    """Return a server with the same ports and store, and these settings."""
    same = {name.removeprefix("TS_").lower(): value for name, value in server.settings.overrides.items()}
    return Server(server.run_dir, Settings(overrides=same | changes))


def test_unchanged_server_needs_no_restart(server: Server, running: Running):
    assert restart_reason(server, running, FOLDERS) == ""


def test_restart_reason_names_what_changed(server: Server, running: Running):
    assert restart_reason(server, running, FOLDERS[:1]) == (
        'The running server has the models mnist, text instead of mnist. To keep text: make serve MODELS="mnist text".'
    )
    settings = "Settings that have changed since the server's start: job_queue_size, max_request_size."
    changed = with_settings(server, job_queue_size="7", max_request_size="1m")
    assert restart_reason(changed, running, FOLDERS) == settings
    server.archive(FOLDERS[1]).write_bytes(b"built again")
    archives = "The running server has other archives of text."
    assert restart_reason(server, running, FOLDERS) == archives
    assert restart_reason(changed, running, FOLDERS) == f"{archives} {settings}"
    old = replace(running, settings={})
    assert "was started by an earlier version of the bundle." in restart_reason(server, old, FOLDERS)


def test_restart_that_turns_tokens_off_says_so(server: Server, running: Running):
    guarded = replace(running, key_file="/run/key_file.json")
    assert "requires tokens; this restart turns them OFF" in restart_reason(server, guarded, FOLDERS)


@pytest.mark.parametrize(
    ("registered", "settings", "reason"),
    [
        (["mnist"], {}, ""),
        (["mnist", "text"], {}, "text was registered through the management API, perhaps from another archive."),
        (
            ["mnist"],
            {"enable_model_api": "false"},
            "TorchServe cannot register text while it runs, because enable_model_api is false.",
        ),
    ],
)
def test_new_model_needs_a_restart_if_it_cannot_be_registered(
    server: Server, running: Running, httpserver: HTTPServer, registered: list, settings: dict, reason: str
):
    models = [{"modelName": name, "modelUrl": f"{name}.mar"} for name in registered]
    httpserver.expect_request("/models").respond_with_json({"models": models})
    served = {"mnist": running.served["mnist"]}
    now = with_settings(server, **settings)
    running = replace(
        running, served=served, settings=now.settings.fingerprint(), management=httpserver.url_for("").rstrip("/")
    )
    assert restart_reason(now, running, FOLDERS) == reason


def test_server_that_does_not_answer_is_restarted_for_a_new_model(server: Server, running: Running):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert restart_reason(server, replace(running, served={}, management=nowhere), FOLDERS) == (
        "The running server does not answer, so it cannot register mnist, text."
    )
