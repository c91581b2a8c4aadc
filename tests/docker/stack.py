"""A Docker stack with its own project name and free ports, for the tests and for the fault trials."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bundle.errors import BundleError
from bundle.paths import ROOT
from bundle.server.client import Client
from bundle.server.ports import free_ports
from tests.support import wait_for

SERVICES = ("torchserve", "proxy", "prometheus")  # not Grafana: its image cannot be built without a registry
UNLIMITED = {"PROXY_RATE": "10000r/s", "BURST": "10000"}  # the limits have tests of their own: test_proxy_limits.py
PORTS = ("PORT", "TLS_PORT", "MANAGEMENT_PORT", "PROMETHEUS_PORT", "LOCUST_PORT")


@dataclass(frozen=True)
class Stack:
    """A running stack.

    Attributes:
        command: the compose command with its project and file.
        environment: the variables of the compose file, including the ports.
    """

    command: list[str]
    environment: dict[str, str]

    def compose(self, *arguments: str, check: bool = True, timeout: float = 1500) -> subprocess.CompletedProcess:
        run = subprocess.run(
            [*self.command, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        return run

    @property
    def project(self) -> str:
        return self.command[self.command.index("-p") + 1]

    def make(self, *arguments: str) -> str:
        run = subprocess.run(
            ["make", *arguments, f"PROJECT={self.project}"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1700,
        )
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
        return run.stdout

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.environment[port]}"

    @property
    def client(self) -> Client:
        """A client that predicts through the proxy, and manages on loopback."""
        return Client(self.url("PORT"), self.url("MANAGEMENT_PORT"))

    def containers(self, service: str = "torchserve") -> list[str]:
        """Return the ids of a service's containers. (`compose ps` takes a second for it, and waits repeat it.)"""
        labels = {"project": self.project, "service": service, "oneoff": "False"}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return docker("ps", "--all", "--quiet", "--no-trunc", *filters).split()

    def container(self, service: str = "torchserve") -> str:
        """Return the id of a service's only container."""
        [found] = self.containers(service)
        return found

    def inspect(self, service: str = "torchserve") -> dict:
        return json.loads(docker("inspect", self.container(service)))[0]

    def execute(self, *command: str) -> str:
        return docker("exec", self.container(), *command)

    def roll_out(self, model: str, archive: Path) -> subprocess.CompletedProcess:
        """Roll out an archive from the host, as an operator does."""
        with tempfile.TemporaryDirectory(prefix="rollout-") as run_dir:
            return subprocess.run(
                [sys.executable, "-m", "bundle", "rollout", model, "--archive", str(archive)],
                cwd=ROOT,
                env={
                    **self.environment,
                    "COMPOSE": " ".join(self.command),
                    "PROJECT": self.project,
                    "RUN_DIR": run_dir,
                },
                capture_output=True,
                text=True,
                timeout=400,
            )

    def wait_until_healthy(self, seconds: float = 300) -> None:
        wait_for(lambda: self.inspect()["State"]["Health"]["Status"] == "healthy", seconds)

    def logs(self, service: str = "torchserve") -> str:
        return self.compose("logs", "--no-color", "--tail", "80", service).stdout


def docker(*arguments: str) -> str:
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def build_archive(model: str, store: Path, **variables: str) -> None:
    """Build a model's archive into a store.

    Args:
        variables: further environment variables of the build.
    """
    built = subprocess.run(
        [sys.executable, "-m", "bundle", "archive", model],
        cwd=ROOT,
        env={**os.environ, "TS_MODEL_STORE": str(store), **variables},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert built.returncode == 0, built.stderr


def compose_command() -> list[str]:
    if given := os.environ.get("COMPOSE"):
        return shlex.split(given)
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def build_image() -> str:
    """Build the server's image as `make image` does, and return its name.

    Raises:
        BundleError: no Docker engine answers.
    """
    check_engine()
    command = [*compose_command(), "-p", "torchserve-test-image", "-f", "docker/compose.yaml"]
    lock = ROOT / "build" / "image.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # of two builds at once, neither finds the layers of the other
        Stack(command, dict(os.environ)).make("image")
    return os.environ.get("SERVER_IMAGE", "torchserve-bundle:latest")


def check_engine() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        raise BundleError("No Docker engine answers. `docker info` shows the reason.")


@contextmanager
def running(services: tuple[str, ...], **settings: str) -> Iterator[Stack]:
    """Build and start the stack, yield it when it is healthy, and remove it with its volumes.

    Args:
        settings: variables of compose.yaml. An image that they name is not built.

    Raises:
        BundleError: no Docker engine answers.
    """
    if "SERVER_IMAGE" in settings:
        check_engine()
    else:
        build_image()
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    project = f"torchserve-test-{os.getpid()}-{ports['PORT']}"
    environment = {**os.environ, **ports, **settings}
    stack = Stack([*compose_command(), "-p", project, "-f", "docker/compose.yaml"], environment)
    try:
        print(stack.make("up", f"SERVICES={' '.join(services)}"))
        yield stack
        stack.make("down")
    finally:
        stack.compose(
            "--profile", "loadtest", "--profile", "page", "--profile", "tracing", "down", "--volumes", check=False
        )
