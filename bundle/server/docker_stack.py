"""Run commands of the host in the Docker stack."""

import os
import shlex
import subprocess
from pathlib import Path

from bundle.errors import BundleError


def running_stack() -> list[str] | None:
    """Return the compose command ($COMPOSE, which make sets) if the stack's TorchServe runs; None otherwise."""
    command = shlex.split(os.environ.get("COMPOSE", ""))
    if not command:
        return None
    try:
        listed = subprocess.run([*command, "ps", "-q", "torchserve"], capture_output=True, text=True)
        inspect = ["docker", "inspect", "--format", "{{.State.Running}}", listed.stdout.strip() or "none"]
        running = subprocess.run(inspect, capture_output=True, text=True)
    except OSError:
        return None
    return command if running.stdout.strip() == "true" else None


def roll_out(stack: list[str], model: str, archive: Path) -> None:
    """Run a rollout in the container, which reads the archive from standard input.

    Raises:
        BundleError: the rollout failed; standard error says why.
    """
    command = [*stack, "exec", "-T", "torchserve", ".venv/bin/python", "-m", "bundle"]
    with archive.open("rb") as content:
        if subprocess.run([*command, "rollout", model, "--archive", "-"], stdin=content).returncode:
            raise BundleError(f"{model} was not rolled out; its container says why above.")
