"""Run commands of the host in the TorchServe containers of the Docker stack."""

import json
import os
import shlex
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from bundle.errors import BundleError
from bundle.server.rollout import Rollout

BUNDLE = (".venv/bin/python", "-m", "bundle")


@dataclass(frozen=True)
class Container:
    """A running TorchServe container, one of the replicas that serve the same."""

    id: str
    name: str

    def run(self, *arguments: str, content: Path | None = None, captured: bool = False) -> str:
        """Run a command of the bundle in the container, and return its standard output if that is captured.

        Args:
            content: a file for the command's standard input.

        Raises:
            BundleError: it failed; its standard error, which is that of this process, says why.
        """
        with (content or Path(os.devnull)).open("rb") as stream:
            done = subprocess.run(
                ["docker", "exec", "--interactive", self.id, *BUNDLE, *arguments],
                stdin=stream,
                stdout=subprocess.PIPE if captured else None,
                text=True,
            )
        if done.returncode:
            raise BundleError(f"`bundle {arguments[0]}` failed in the container {self.name}, which says why above.")
        return done.stdout or ""


def containers() -> list[Container]:
    """Return the TorchServe containers of the stack ($COMPOSE is its compose command; make sets it); [] if none runs.

    Raises:
        BundleError: only some of them run.
    """
    command = shlex.split(os.environ.get("COMPOSE", ""))
    if not command:
        return []
    try:
        listed = subprocess.run([*command, "ps", "-a", "-q", "torchserve"], capture_output=True, text=True)
        inspect = ["docker", "inspect", "--format", "{{.State.Running}} {{.Id}} {{.Name}}", *listed.stdout.split()]
        inspected = subprocess.run(inspect, capture_output=True, text=True) if listed.stdout.split() else listed
    except OSError:
        return []
    found = [line.split() for line in inspected.stdout.splitlines()]
    stopped = [name.lstrip("/") for running, _, name in found if running != "true"]
    if stopped and len(stopped) < len(found):
        raise BundleError(f"{', '.join(stopped)} is not running, so not all replicas would change. Start it: make up")
    return [] if stopped else sorted((Container(id, name.lstrip("/")) for _, id, name in found), key=lambda c: c.name)


@dataclass(frozen=True)
class ContainerReplica:
    """A rollout's steps in a container, which reads the archive from standard input."""

    container: Container
    model: str

    @property
    def name(self) -> str:
        return self.container.name

    def prepare(self, archive: Path) -> Rollout:
        printed = self.container.run("rollout-step", "prepare", self.model, content=archive, captured=True)
        return Rollout(**json.loads(printed))

    def switch(self, rollout: Rollout) -> None:
        self._step("switch", rollout)

    def finish(self, rollout: Rollout) -> None:
        self._step("finish", rollout)

    def undo(self, rollout: Rollout) -> None:
        self._step("undo", rollout)

    def _step(self, step: str, rollout: Rollout) -> None:
        self.container.run("rollout-step", step, self.model, "--rollout", json.dumps(asdict(rollout)))
