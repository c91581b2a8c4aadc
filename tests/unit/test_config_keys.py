"""The keys and values of config.properties. TorchServe ignores an unknown key silently; here it fails a test."""

import importlib.metadata
import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CONFIG = Path(__file__).parents[2] / "config.properties"
KEYS_READ = Path(__file__).with_name("torchserve_keys.txt")
ADDRESSES = {
    "inference_address",
    "management_address",
    "metrics_address",
    "grpc_inference_address",
    "grpc_management_address",
}
# these belong in models/<name>/model-config.yaml
MODEL_LEVEL = {"models", "load_models", "model_snapshot", "default_service_handler", "service_envelope"}


@pytest.fixture(scope="module")
def settings() -> list[tuple[str, str]]:
    lines = CONFIG.read_text(encoding="ascii").splitlines()
    return [tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")]


def test_list_of_keys_is_that_of_the_installed_torchserve():
    """After an upgrade, update torchserve_keys.txt from the new release."""
    assert f"TorchServe {importlib.metadata.version('torchserve')} reads" in KEYS_READ.read_text()


def test_every_key_is_read_by_torchserve(settings):
    listed = {line for line in KEYS_READ.read_text().splitlines() if not line.startswith("#")}
    assert {key for key, _ in settings} - listed == set()


def test_every_key_appears_once(settings):
    keys = [key for key, _ in settings]
    assert len(keys) == len(set(keys))


def test_java_and_python_parse_the_file_alike():
    """java.util.Properties supports escapes, continued lines and three separators; the Python wrapper only `=`."""
    lines = CONFIG.read_text(encoding="ascii").splitlines()
    assert [line for line in lines if line and not re.fullmatch(r"#.*|[a-z_]+=[^\s\\][^\\]*", line)] == []


def test_every_address_is_on_loopback(settings):
    addresses = {key: value for key, value in settings if key.endswith("_address")}
    assert addresses.keys() == ADDRESSES
    for value in addresses.values():
        host = urlsplit(value).hostname if "://" in value else value
        assert ipaddress.ip_address(host).is_loopback, value


def test_no_setting_belongs_to_a_model(settings):
    assert {key for key, _ in settings} & MODEL_LEVEL == set()
