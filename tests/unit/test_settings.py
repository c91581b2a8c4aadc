"""Settings: config.properties, overridden by the environment, checked before TorchServe reads them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from bundle.digests import changed
from bundle.errors import BundleError
from bundle.paths import ROOT
from bundle.server.settings import Settings
from bundle.signing import make_keys


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
        ("inference_address", "http://[::1]:8080", "cannot listen on an IPv6 address. Use an IPv4 address, such as"),
        ("metrics_address", "http://[::]:8082", "metrics_address is 'http://[::]:8082', and TorchServe's HTTP server"),
        ("inference_address", "http://127.0.0.1:8081", "inference_address and management_address are both http://"),
        ("job_queue_size", "\N{SUPERSCRIPT TWO}", "and must be a whole number, like 100."),
        ("job_queue_size", "99999999999", "and must be a whole number, like 100."),
        ("grpc_inference_port", "99999", "TS_GRPC_INFERENCE_PORT is '99999', and must be a port, like 7070."),
        ("max_request_size", "64MB", "is '64MB', and must be a number of bytes, or a size like 64m."),
        ("max_request_size", "2048m", "TS_MAX_REQUEST_SIZE is '2147483648', and must be a number of bytes, or a size"),
        ("grpc_management_port", "0", "TS_GRPC_MANAGEMENT_PORT is '0', and must be a port, like 7071."),
    ],
)
def test_check_names_invalid_setting(key: str, value: str, message: str):
    with pytest.raises(BundleError, match=re.escape(message)):
        Settings(overrides={key: value}).check()


def test_check_accepts_valid_settings():
    Settings().check()
    Settings(overrides={"job_queue_size": "7", "enable_model_api": "TRUE"}).check()


def test_environment_overrides_file_and_argument_overrides_both(monkeypatch: pytest.MonkeyPatch):
    usual = Settings()["job_queue_size"]
    monkeypatch.setenv("TS_JOB_QUEUE_SIZE", "7")
    assert usual != "7"
    assert Settings()["job_queue_size"] == "7"
    assert Settings(overrides={"job_queue_size": "8"})["job_queue_size"] == "8"


@pytest.mark.parametrize(("size", "read"), [("64m", "67108864"), ("9K", "9216"), ("1000", "1000"), ("0x", "0x")])
def test_size_of_a_body_is_passed_on_in_bytes(monkeypatch: pytest.MonkeyPatch, size: str, read: str):
    """TorchServe reads numbers only, and does not start with 64m."""
    monkeypatch.setenv("TS_MAX_REQUEST_SIZE", size)
    assert Settings().passed_on()["TS_MAX_REQUEST_SIZE"] == Settings()["max_request_size"] == read


def test_relative_path_in_settings_starts_at_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TS_CERTIFICATE_FILE", "certificates/server.pem")
    environment = Settings().environment()
    assert environment["TS_MODEL_STORE"] == str(ROOT / "model_store")
    assert environment["TS_CERTIFICATE_FILE"] == str(ROOT / "certificates/server.pem")
    assert "TS_PRIVATE_KEY_FILE" not in environment  # not set
    assert Settings(overrides={"model_store": "/srv/store"}).environment()["TS_MODEL_STORE"] == "/srv/store"


def test_secrets_are_not_passed_to_the_server(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "TS_KEYSTORE_PASS", "HARMLESS"):
        monkeypatch.setenv(name, "value")
    passed = Settings().passed_on()
    assert "HARMLESS" in passed
    assert "TS_KEYSTORE_PASS" in passed  # TorchServe's own
    assert not {"AWS_SECRET_ACCESS_KEY", "DATABASE_URL"} & passed.keys()


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"LC_ALL": "C"}, "C.UTF-8"),
        ({}, "C.UTF-8"),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "POSIX"}, "C.UTF-8"),
        ({"LC_CTYPE": "de_DE.ISO-8859-1", "LANG": "de_DE.UTF-8"}, "C.UTF-8"),
        ({"LC_ALL": "", "LANG": "de_DE.utf8"}, ""),
        ({"LC_ALL": "C.UTF-8"}, "C.UTF-8"),
        ({"LANG": "en_US.UTF-8"}, None),
    ],
)
def test_locale_of_the_server_is_utf_8(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], passed: str | None):
    """In another locale, Java cannot open a file whose path has other letters than those of ASCII."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert Settings().passed_on().get("LC_ALL") == passed


@pytest.mark.parametrize(("value", "asks"), [("true", False), ("TRUE", False), ("false", True)])
def test_tokens_are_required_unless_disabled(value: str, asks: bool):
    assert Settings(overrides={"disable_token_authorization": value}).asks_for_keys == asks


def test_url_of_a_server_on_every_interface_is_loopback():
    settings = Settings(overrides={"inference_address": "http://0.0.0.0:9080/", "metrics_address": "https://h:1"})
    assert settings.url("inference_address") == "http://127.0.0.1:9080"
    assert settings.url("metrics_address") == "https://h:1"


def test_listeners_are_named_by_the_setting_of_their_port():
    settings = Settings(
        overrides={
            "inference_address": "http://0.0.0.0:1",
            "management_address": "http://127.0.0.1:2",
            "metrics_address": "http://127.0.0.4:3",
            "grpc_inference_address": "::1",
            "grpc_inference_port": "4",
            "grpc_management_address": "127.0.0.3",
            "grpc_management_port": "5",
        }
    )
    assert settings.listeners() == {
        "inference_address": ("0.0.0.0", 1),
        "management_address": ("127.0.0.1", 2),
        "metrics_address": ("127.0.0.4", 3),
        "grpc_inference_port": ("::1", 4),
        "grpc_management_port": ("127.0.0.3", 5),
    }
    assert settings.inference_ports() == {1, 4}


@pytest.mark.parametrize(
    ("address", "target"),
    [("127.0.0.1", "127.0.0.1:4"), ("0.0.0.0", "127.0.0.1:4"), ("::1", "[::1]:4"), ("::", "[::1]:4"), ("h", "h:4")],
)
def test_grpc_target_is_an_address_for_clients_on_this_machine(address: str, target: str):
    overrides = {"grpc_inference_address": address, "grpc_inference_port": "4"}
    assert Settings(overrides=overrides).grpc_target() == target


def test_log_config_is_the_file_in_vmargs(tmp_path: Path):
    assert Settings().log_config == ROOT / "bundle" / "config" / "log4j2.xml"
    file = tmp_path / "config.properties"
    file.write_text("vmargs=-Xmx1g\nmodel_store=model_store\n")
    assert Settings(file).log_config is None


def test_fingerprint_changes_with_everything_that_needs_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "config.properties"
    file.write_text("job_queue_size=100\n")
    found = [Settings(file).fingerprint()]
    assert Settings(file).fingerprint() == found[0]
    found.append(Settings(file, {"job_queue_size": "7"}).fingerprint())
    file.write_text("job_queue_size=101\n")
    found.append(Settings(file).fingerprint())
    monkeypatch.setenv("TRUSTED_KEY", str(make_keys(tmp_path / "signing.key")))
    found.append(Settings(file).fingerprint())
    monkeypatch.setenv("BUNDLE_FRONTEND_OFF", "gather")
    found.append(Settings(file).fingerprint())
    names = [changed(*pair) for pair in pairwise(found)]
    assert names == ["job_queue_size", f"{file}, job_queue_size", "TRUSTED_KEY", "BUNDLE_FRONTEND_OFF"]
    monkeypatch.setenv("OTHER", "value")
    assert Settings(file).fingerprint() == found[-1]
