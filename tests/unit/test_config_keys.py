"""TorchServe ignores a key that it does not know, without a word: here such a key fails a test."""

import importlib.metadata
import ipaddress
import re
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.unit.classfile import loaded_strings

CONFIG = Path(__file__).parents[2] / "config.properties"
ADDRESSES = {
    "inference_address",
    "management_address",
    "metrics_address",
    "grpc_inference_address",
    "grpc_management_address",
}
# What one model is, or a handler or envelope forced on all of them: models/<name>/model-config.yaml says that.
MODEL_LEVEL = {"models", "load_models", "model_snapshot", "default_service_handler", "service_envelope"}


@pytest.fixture(scope="module")
def keys_read() -> set[str]:
    """What the frontend and its Python wrapper look up. ConfigManager is the only Java class that reads the
    file; its inner class Arguments knows command line options, which are no keys."""
    torchserve = importlib.metadata.distribution("torchserve")
    with zipfile.ZipFile(torchserve.locate_file("ts/frontend/model-server.jar")) as jar:
        frontend = loaded_strings(jar.read("org/pytorch/serve/util/ConfigManager.class"))
    wrapper = Path(torchserve.locate_file("ts/model_server.py")).read_text()
    return frontend | set(re.findall(r'props\.get\("(\w+)"', wrapper))


@pytest.fixture(scope="module")
def settings() -> list[tuple[str, str]]:
    lines = CONFIG.read_text(encoding="ascii").splitlines()
    return [tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "key", ["netty_client_threads", "metrics_mode", "enable_envvars_config", "vmargs", "plugins_path", "model_store"]
)
def test_the_reader_finds_keys_that_are_read(keys_read, key):
    assert key in keys_read


@pytest.mark.parametrize(
    "key",
    [
        "metrics_format",  # in upstream's documentation
        "number_of_netty_client_threads",  # likewise
        "num_netty_threads",
        "MODEL_METRICS",  # declared in ConfigManager, and inlined into other classes only
    ],
)
def test_the_reader_finds_keys_that_are_not_read(keys_read, key):
    assert key not in keys_read


def test_the_reader_refuses_what_is_no_class_file():
    with pytest.raises(ValueError, match="not a class file"):
        loaded_strings(b"PK\x03\x04" + bytes(16))


def test_every_key_is_read(settings, keys_read):
    assert {key for key, _ in settings} - keys_read == set()


def test_every_key_appears_once(settings):
    keys = [key for key, _ in settings]
    assert len(keys) == len(set(keys))


def test_java_and_the_python_wrapper_parse_the_file_alike():
    """java.util.Properties knows escapes, line continuation and three separators; the wrapper knows `=` only."""
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
