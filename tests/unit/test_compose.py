"""What SECURITY.md says of the containers, as docker/compose.yaml has it."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # so no seccomp or AppArmor profile but Docker's own
    assert not service.keys() & {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices", "userns_mode"}
    assert not [volume for volume in service.get("volumes", ()) if "docker.sock" in volume]


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "grafana"])
def test_the_root_file_system_is_read_only(name):
    assert SERVICES[name]["read_only"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_all_but_inference_is_published_on_loopback(name):
    for port in SERVICES[name].get("ports", ()):
        assert port.startswith("${BIND:-127.0.0.1}:" if name == "proxy" else "127.0.0.1:")


def test_the_server_believes_the_proxys_headers_and_inference_is_published_by_the_proxy_alone():
    assert SERVICES["torchserve"]["environment"]["BUNDLE_BEHIND_PROXY"] == "true"
    assert not [port for port in SERVICES["torchserve"].get("ports", ()) if not port.endswith(":8081")]


# what both Make's commands and the stack read, with the same meaning
SHARED = {"MODELS", "TORCH_INDEX_URL", "TRUSTED_KEY", "TS_MODEL_STORE"}


def test_no_variable_means_one_thing_to_a_command_and_another_to_the_stack():
    """RATE was the load test's arrivals and the proxy's limit: exported for one, it changed the other."""
    makefile = (ROOT / "Makefile").read_text()
    lists = " ".join(re.findall(r"\$\(call options,([A-Z0-9_ ]+)\)", makefile)).split()
    commands = {*re.findall(r"\$\(([A-Z][A-Z0-9_]*)\)", makefile), *lists}
    locust = {"SHAPE", "USERS", "DURATION", "RATE", "THRESHOLDS", "MODELS"}
    assert {"PATCH", "RATE", "MODELS"} <= commands
    files = [file.read_text() for file in (ROOT / "docker").glob("compose*.yaml")]
    stack = {name for text in files for name in re.findall(r"\$\{([A-Z0-9_]+)", text)}
    assert {"PROXY_RATE", "SERVER_IMAGE"} <= stack
    assert stack & (commands | locust) == SHARED
