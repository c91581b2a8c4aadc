"""docker/up.sh with several containers: what it replaces, and what it leaves when something fails.

To save time, the containers are not TorchServe: each is healthy while it has a file, and one with `SETTING=bad` ends
while it starts. test_replicas.py replaces those of TorchServe, under load.
"""

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docker.proxy import IMAGE
from tests.docker.stack import compose_command, docker
from tests.support import wait_for

pytestmark = pytest.mark.usefixtures("engine")
ROOT = Path(__file__).parents[2]
FILE = """
services:
  torchserve:
    image: $IMAGE
    init: true
    command: [sh, -c, 'test "$$SETTING" != bad && touch /tmp/ok && exec sleep 3600']
    environment: {SETTING: "${SETTING:-}", BUNDLE_REPLICAS: "${REPLICAS:-1}"}
    scale: ${REPLICAS:-1}
    healthcheck: {test: test -e /tmp/ok, interval: 1s, retries: 1}
    ports: ["127.0.0.1:${MANAGEMENT_PORT:-8081}:8081"]
    networks: [back]
    restart: unless-stopped
  proxy:
    image: $IMAGE
    init: true
    command: [sleep, "3600"]
    depends_on: [torchserve]
    networks: [back]
networks:
  back:
"""


@dataclass
class Containers:
    """Containers of a compose file of this test, which up.sh starts and replaces."""

    project: str
    compose: list[str]
    port: int

    def up(self, replicas: int = 3, services: str = "", compose: list[str] | None = None, **settings: str):
        """Run up.sh, and return how it ended."""
        return subprocess.run(
            ["sh", str(ROOT / "docker" / "up.sh"), self.project, services, *(compose or self.compose)],
            env={
                **os.environ,
                "REPLICAS": str(replicas),
                "MANAGEMENT_PORT": str(self.port),
                "WAIT_SECONDS": "30",
                **settings,
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    def healthy(self) -> dict[str, int]:
        """Map the id of each healthy container to its port on the host."""
        return {each: port for each, (health, port) in self.found().items() if health == "healthy"}

    def found(self) -> dict[str, tuple[str, int]]:
        ids = docker("ps", "-aq", "--no-trunc", *self.filters("torchserve")).split()
        template = '{{.Id}} {{with index .State "Health"}}{{.Status}}{{else}}none{{end}}'
        template += ' {{with index .NetworkSettings.Ports "8081/tcp"}}{{(index . 0).HostPort}}{{else}}0{{end}}'
        lines = docker("inspect", "--format", template, *ids).splitlines() if ids else []
        return {each: (health, int(port)) for each, health, port in map(str.split, lines)}

    def filters(self, service: str) -> list[str]:
        labels = {"project": self.project, "service": service}
        return [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    """Three healthy containers."""
    file, project = tmp_path / "compose.yaml", f"bundle-test-up-{uuid.uuid4().hex[:8]}"
    file.write_text(FILE.replace("$IMAGE", IMAGE))
    command = [*compose_command(), "-p", project, "-f", str(file)]
    # away from the ports that the system gives to connections; free ones next to each other
    made = Containers(project, command, 20000 + uuid.uuid4().int % 10000)
    try:
        started = made.up()
        assert started.returncode == 0, started.stderr
        assert len(made.healthy()) == 3
        yield made
    finally:
        environment = {**os.environ, "MANAGEMENT_PORT": str(made.port)}
        subprocess.run([*command, "down", "--timeout", "1"], env=environment, capture_output=True, timeout=120)


def test_version_that_does_not_start_costs_one_replica_however_often_it_is_tried(containers: Containers):
    old = set(containers.healthy())
    for _ in range(2):
        failed = containers.up(SETTING="bad")
        assert failed.returncode == 1
        assert "The new replica does not become ready" in failed.stderr
        assert "2 with the images and settings of before still serve." in failed.stderr
        assert len(old & set(containers.healthy())) == 2

    corrected = containers.up(SETTING="good")
    assert corrected.returncode == 0, corrected.stderr
    assert len(containers.healthy()) == 3
    assert not old & set(containers.healthy())

    unchanged = set(containers.found())
    assert containers.up(SETTING="good").returncode == 0
    assert set(containers.found()) == unchanged


def test_interrupted_replacement_is_continued_with_the_container_that_it_has_made(containers: Containers):
    old = containers.healthy()
    first = min(old, key=lambda each: old[each])
    docker("rm", "--force", first)
    create = [*containers.compose, "up", "--no-start", "--no-recreate", "--scale", "torchserve=3", "torchserve"]
    ports = {"REPLICAS": "3", "MANAGEMENT_PORT": f"{containers.port}-{containers.port + 2}"}
    subprocess.run(create, env={**os.environ, **ports, "SETTING": "good"}, check=True, capture_output=True, timeout=120)
    [created] = set(containers.found()) - set(old)
    assert containers.found()[created] == ("none", 0)

    began = time.time()
    done = containers.up(SETTING="good")
    assert done.returncode == 0, done.stderr
    assert created in containers.healthy()
    assert len(containers.healthy()) == 3
    assert not set(old) & set(containers.healthy())
    # it serves before the next one stops
    span = f"--since={began - 1:.0f}", f"--until={time.time() + 1:.0f}"
    told = docker("events", *span, "--format={{.ID}} {{.Status}}").splitlines()
    stops = [told.index(f"{each} die") for each in old if each != first]
    assert told.index(f"{created} health_status: healthy") < min(stops)


def test_scaling_down_to_the_port_of_a_healthy_container_keeps_one_serving(containers: Containers):
    old = containers.healthy()
    second = next(each for each, port in old.items() if port == containers.port + 1)
    docker("exec", second, "rm", "/tmp/ok")
    wait_for(lambda: second not in containers.healthy())

    done = containers.up(replicas=1)
    assert done.returncode == 0, done.stderr
    [(last, port)] = containers.healthy().items()
    assert (last in old, port) == (False, containers.port)
    assert len(containers.found()) == 1


def test_service_that_depends_on_torchserve_keeps_all_replicas(containers: Containers):
    before = containers.healthy()
    done = containers.up(services="proxy")
    assert done.returncode == 0, done.stderr
    assert containers.healthy() == before
    containers.up(services="proxy", SETTING="bad")
    assert len(set(before) & set(containers.healthy())) == 2


@pytest.mark.parametrize(
    ("prints", "message", "serving"),
    [
        ("echo no such file >&2; exit 1", "no such file", 3),
        ("echo torchserve 0123; exit", "it is unknown which replicas are outdated", 2),
    ],
)
def test_hash_that_compose_does_not_know_replaces_no_second_replica(
    containers: Containers, tmp_path: Path, prints: str, message: str, serving: int
):
    """A release of compose may print another hash than it writes to the label."""
    before = set(containers.healthy())
    compose = tmp_path / "compose"
    case = f'case "$*" in *"config --hash"*) {prints} ;; esac'
    compose.write_text(f'#!/bin/sh\n{case}\nexec {" ".join(containers.compose)} "$@"\n')
    compose.chmod(0o755)
    for _ in range(2):
        failed = containers.up(compose=[str(compose)])
        assert failed.returncode != 0
        assert message in failed.stderr
    assert len(before & set(containers.healthy())) == serving


def test_image_without_a_health_check_is_named(containers: Containers):
    file = Path(containers.compose[-1])
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "healthcheck" not in line))
    failed = containers.up()
    assert failed.returncode == 1
    assert "has no HEALTHCHECK" in failed.stderr
