"""What a server says of itself, without one that runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bundle.catalog import select
from bundle.errors import BundleError
from bundle.server.process import Running, Server
from bundle.server.settings import Settings

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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("job_queue_size", "many", "TS_JOB_QUEUE_SIZE is 'many', and must be a whole number, like 100."),
        ("grpc_inference_port", "", "TS_GRPC_INFERENCE_PORT is '', and must be a whole number"),
        ("enable_model_api", "yes", "TS_ENABLE_MODEL_API is 'yes', and must be true or false."),
        ("metrics_address", "127.0.0.1:8082", "metrics_address is '127.0.0.1:8082', and must look like http://"),
        ("inference_address", "http://127.0.0.1", "inference_address is 'http://127.0.0.1', and must look like"),
        ("inference_address", "http://127.0.0.1:many", "must look like http://127.0.0.1:8080."),
        ("inference_address", "http://127.0.0.1:99999", "must look like http://127.0.0.1:8080."),
        ("inference_address", "http://[::1", "must look like http://127.0.0.1:8080."),
        ("job_queue_size", "\N{SUPERSCRIPT TWO}", "and must be a whole number, like 100."),
        ("job_queue_size", "99999999999", "and must be a whole number, like 100."),
        ("grpc_inference_port", "99999", "TS_GRPC_INFERENCE_PORT is '99999', and must be a port, like 7070."),
        ("grpc_management_port", "0", "TS_GRPC_MANAGEMENT_PORT is '0', and must be a port, like 7071."),
    ],
)
def test_a_setting_that_is_none_is_named(key: str, value: str, message: str):
    with pytest.raises(BundleError, match=re.escape(message)):
        Settings(overrides={key: value}).check()


def test_without_java_nothing_is_stopped(server: Server, monkeypatch: pytest.MonkeyPatch):
    def none() -> Path:
        raise BundleError("No Java 11 or newer was found.")

    monkeypatch.setattr("bundle.server.process.java_home", none)
    with pytest.raises(BundleError, match="No Java"):
        server.check([])


def test_settings_that_are_some():
    Settings().check()
    Settings(overrides={"job_queue_size": "7", "enable_model_api": "TRUE"}).check()
