"""docker/compose.yaml confines the containers as SECURITY.md says."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
STAGES = (ROOT / "docker" / "Dockerfile").read_text().split("\nFROM ")


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # and so Docker's own seccomp and AppArmor profiles
    assert not service.keys() & {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices", "userns_mode"}
    assert not [volume for volume in service.get("volumes", ()) if "docker.sock" in volume]


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "grafana"])
def test_root_file_system_is_read_only_except_in_grafana(name):
    assert SERVICES[name]["read_only"] is True


def test_every_port_is_published_on_loopback_and_only_the_proxys_can_be_moved():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published.keys() >= {"proxy", "torchserve", "grafana"}
    for name, ports in published.items():
        start = "${BIND:-127.0.0.1}:" if name == "proxy" else "127.0.0.1:"
        assert [port for port in ports if not port.startswith(start)] == []


def test_inference_is_published_only_by_the_proxy_whose_headers_the_server_trusts():
    assert SERVICES["torchserve"]["environment"]["BUNDLE_BEHIND_PROXY"] == "true"
    assert not [port for port in SERVICES["torchserve"].get("ports", ()) if not port.endswith(":8081")]


def test_proxy_and_torchserve_have_the_same_limit_of_a_body():
    limits = [
        SERVICES["proxy"]["environment"]["MAX_BODY"],
        SERVICES["torchserve"]["environment"]["TS_MAX_REQUEST_SIZE"],
    ]
    assert limits == ["${MAX_BODY:-16m}"] * 2


def test_page_has_a_profile_of_its_own_and_reaches_only_the_proxy():
    page = SERVICES["page"]
    assert (page["profiles"], page["networks"], page.get("ports")) == (["page"], ["page"], None)
    assert COMPOSE["networks"]["page"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "page" in service["networks"]} == {"page", "proxy"}
    assert SERVICES["proxy"]["environment"]["PAGE_HOST"] == "${PAGE_HOST:-}"  # without it, nothing is published


@pytest.mark.parametrize("target", [service["build"]["target"] for service in SERVICES.values() if "build" in service])
def test_image_runs_as_a_user_of_its_own(target: str):
    [stage] = [stage for stage in STAGES if stage.partition("\n")[0].endswith(f" AS {target}")]
    [user] = re.findall(r"^USER (\d+)", stage, re.MULTILINE)
    assert user == "10001"


TRACING = " -f docker/compose.tracing.yaml --profile tracing"


@pytest.mark.parametrize(("switch", "profile"), [([], ""), (["PAGE=1"], " --profile page"), (["TRACING=1"], TRACING)])
def test_make_starts_the_page_and_jaeger_if_it_is_asked_to(switch: list[str], profile: str):
    shown = subprocess.run(
        ["make", "--dry-run", "up", "COMPOSE=compose", *switch], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    started = [" ".join(line.split()) for line in shown.stdout.splitlines() if "docker/up.sh" in line]
    command = f"compose -p torchserve-bundle -f docker/compose.yaml{profile}"
    assert started == [f'REPLICAS="1" sh docker/up.sh "torchserve-bundle" "" {command}']


def up(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
    """Run `make up` with programs that print their arguments in place of Docker's, and return what these printed."""
    printed = tmp_path / "printed"
    for name in ("docker", "compose"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $* $REPLICAS $MANAGEMENT_PORT" >>{printed}\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["make", "up", "COMPOSE=compose"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MANAGEMENT_PORT": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, printed.read_text() if printed.exists() else ""


@pytest.mark.parametrize(
    ("environment", "scale", "ports"),
    [
        ({}, 1, ""),
        ({"REPLICAS": "3"}, 3, "8081-8083"),
        ({"REPLICAS": "2", "MANAGEMENT_PORT": "9081"}, 2, "9081-9082"),
        ({"MANAGEMENT_PORT": "9081"}, 1, "9081"),
    ],
)
def test_replicas_are_a_scale_and_a_range_of_ports(tmp_path: Path, environment: dict[str, str], scale: int, ports: str):
    done, printed = up(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    command = "compose -p torchserve-bundle -f docker/compose.yaml"
    assert f"{command} up --detach {scale} {ports}\n" in printed
    assert SERVICES["torchserve"]["scale"] == "${REPLICAS:-1}"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"REPLICAS": "0"}, "error: REPLICAS is '0'. It must be a whole number from 1 to 99."),
        ({"REPLICAS": "three"}, "error: REPLICAS is 'three'. It must be a whole number from 1 to 99."),
        ({"REPLICAS": ""}, "error: REPLICAS is ''. It must be a whole number from 1 to 99."),
        (
            {"REPLICAS": "2", "MANAGEMENT_PORT": "8081-8083"},
            "error: MANAGEMENT_PORT is '8081-8083'. It must be the first of 2 ports.",
        ),
        (
            {"REPLICAS": "2", "TS_DISABLE_TOKEN_AUTHORIZATION": "false"},
            "error: REPLICAS is 2 and tokens are on. Each TorchServe makes keys of its own, so no key would fit all "
            "replicas.",
        ),
    ],
)
def test_invalid_number_of_replicas_is_named_and_starts_nothing(tmp_path: Path, environment, message: str):
    done, printed = up(tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == message
    assert printed == ""


def test_traces_are_off_unless_there_is_an_endpoint_and_both_know_it():
    server, proxy = (SERVICES[name]["environment"] for name in ("torchserve", "proxy"))
    assert server["OTEL_EXPORTER_OTLP_ENDPOINT"] == proxy["TRACE_ENDPOINT"] == "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"
    assert server["OTEL_TRACES_SAMPLER_ARG"] == proxy["TRACE_RATIO"] == "${TRACE_RATIO:-0.1}"


def test_attributes_of_spans_come_from_a_variable_that_the_docker_command_does_not_set():
    """`docker compose` has its own OTEL_RESOURCE_ATTRIBUTES, in place of the user's or after it."""
    assert SERVICES["torchserve"]["environment"]["OTEL_RESOURCE_ATTRIBUTES"] == "${TRACE_ATTRIBUTES:-}"
    files = [file.read_text() for file in (ROOT / "docker").glob("compose*.yaml")]
    assert not [text for text in files if "${OTEL_RESOURCE_ATTRIBUTES" in text]


def test_jaeger_is_reached_by_torchserve_and_grafana_which_finds_its_traces():
    jaeger, more = SERVICES["jaeger"], yaml.safe_load((ROOT / "docker" / "compose.tracing.yaml").read_text())
    assert jaeger["profiles"] == ["tracing"]
    for name in ("torchserve", "grafana"):
        assert set(jaeger["networks"]) & set(SERVICES[name]["networks"])
    mounted = [volume.split(":")[0] for volume in more["services"]["grafana"]["volumes"]]
    files = [ROOT / "docker" / path for path in mounted]
    assert all(file.exists() for file in files)
    [source] = yaml.safe_load(files[0].read_text())["datasources"]
    dashboard = json.loads((files[2] / "traces.json").read_text())
    queries = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert {query["datasource"]["uid"] for query in queries} == {source["uid"]}
    assert {(query["service"], query["operation"]) for query in queries} == {("torchserve", "request")}
    links = json.loads((ROOT / "docker/grafana/dashboards/torchserve.json").read_text())["links"]
    assert [link["tags"] for link in links if link["type"] == "dashboards"] == [dashboard["tags"]]


# variables that Make's commands and the stack read, with the same meaning
SHARED = {"MODELS", "REPLICAS", "TORCH_INDEX_URL", "TRUSTED_KEY", "TS_MODEL_STORE"}


def test_variables_shared_by_commands_and_the_stack_are_known():
    """A variable with two meanings, exported for the one, would change the other."""
    makefile = (ROOT / "Makefile").read_text()
    lists = " ".join(re.findall(r"\$\(call options,([A-Z0-9_ ]+)\)", makefile)).split()
    commands = {*re.findall(r"\$\(([A-Z][A-Z0-9_]*)\)", makefile), *lists}
    locust = {"SHAPE", "USERS", "DURATION", "RATE", "THRESHOLDS", "MODELS"}
    assert {"PATCH", "RATE", "MODELS"} <= commands
    files = [file.read_text() for file in (ROOT / "docker").glob("compose*.yaml")]
    stack = {name for text in files for name in re.findall(r"\$\{([A-Z0-9_]+)", text)}
    assert {"PROXY_RATE", "SERVER_IMAGE"} <= stack
    assert stack & (commands | locust) == SHARED
