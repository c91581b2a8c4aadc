"""The Docker stack, as far as commands on the host reach into it."""

import os
import shlex
import subprocess
from pathlib import Path

from bundle.errors import BundleError


def running_stack() -> list[str] | None:
    """The compose command ($COMPOSE, which make sets) of a stack whose TorchServe is up; None where there is none."""
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
    """Runs the rollout inside the container, which is given the archive on standard input.

    Raises:
        BundleError: it failed; it has said why on standard error.
    """
    command = [*stack, "exec", "-T", "torchserve", ".venv/bin/python", "-m", "bundle"]
    with archive.open("rb") as content:
        if subprocess.run([*command, "rollout", model, "--archive", "-"], stdin=content).returncode:
            raise BundleError(f"{model} was not rolled out; its container says why above.")
