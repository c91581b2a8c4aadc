"""Run commands of the host in the TorchServe containers of the Docker stack."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from bundle.errors import BundleError, NotRunning
from bundle.server.rollout import PreparedNevertheless, Rollout

BUNDLE = (".venv/bin/python", "-m", "bundle")
INSPECTED = "{{.State.Running}} {{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}} {{.Id}} {{.Name}}"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while a command ran in a container, where it could not be stopped. It has ended since.

    Attributes:
        done: what it returned.
        failure: the error, if it failed.
    """

    def __init__(self, done: subprocess.CompletedProcess, failure: BundleError | None):
        super().__init__()
        self.done, self.failure = done, failure


@dataclass(frozen=True)
class Container:
    """A running TorchServe container, one of the replicas that serve the same.

    Args:
        report: gets a line for the user.
    """

    id: str
    name: str
    report: Callable[[str], object]

    def run(self, *arguments: str, content: Path | None = None, captured: bool = False) -> str:
        """Run a command of the bundle in the container, and return its standard output if that is captured.

        Args:
            content: a file for the command's standard input.

        Raises:
            NotRunning: it failed because TorchServe is not running, or does not serve the model.
            BundleError: it failed for another reason; its standard error, which is that of this process, says why.
            Interrupted: Ctrl-C came meanwhile. Docker does not pass it on, so that the command ran to its end.
        """
        interrupt = None
        with (content or Path(os.devnull)).open("rb") as stream, ThreadPoolExecutor(1) as pool:
            ending = pool.submit(  # in a thread, because Ctrl-C interrupts the main thread alone
                subprocess.run,
                ["docker", "exec", "--interactive", self.id, *BUNDLE, *arguments],
                stdin=stream,
                stdout=subprocess.PIPE if captured else None,
                text=True,
                start_new_session=True,  # the terminal sends Ctrl-C to the whole session
            )
            while not ending.done():
                try:
                    wait([ending])
                except KeyboardInterrupt as exc:
                    interrupt = exc
                    self.report(f"Interrupted. Waiting until `bundle {arguments[0]}` has ended in {self.name}.")
        done, failure = ending.result(), None
        if done.returncode:
            kind = NotRunning if done.returncode == NotRunning.status else BundleError
            failure = kind(f"`bundle {arguments[0]}` failed in the container {self.name}, which says why above.")
        if interrupt:
            raise Interrupted(done, failure) from interrupt
        if failure:
            raise failure
        return done.stdout or ""


def containers(report: Callable[[str], object]) -> list[Container]:
    """Return the TorchServe containers of the stack ($COMPOSE is its compose command; make sets it); [] if none runs.

    Args:
        report: gets lines for the user.

    Raises:
        BundleError: only some of them run, or one is starting. An unhealthy one is returned: a change may mend it.
    """
    command = shlex.split(os.environ.get("COMPOSE", ""))
    if not command:
        return []
    try:
        listed = subprocess.run([*command, "ps", "-a", "-q", "torchserve"], capture_output=True, text=True)
        inspect = ["docker", "inspect", "--format", INSPECTED, *listed.stdout.split()]
        inspected = subprocess.run(inspect, capture_output=True, text=True) if listed.stdout.split() else listed
    except OSError:
        return []
    found = [line.split() for line in inspected.stdout.splitlines()]
    stopped = [name.lstrip("/") for running, _, _, name in found if running != "true"]
    if len(stopped) == len(found):
        return []
    if stopped:
        raise BundleError(f"{', '.join(stopped)} is not running, so not all replicas would change. Start it: make up")
    if starting := [name.lstrip("/") for _, health, _, name in found if health == "starting"]:
        raise BundleError(
            f"{', '.join(starting)} is still starting, and would undo a change when it restores the state of before. "
            "Wait until `docker ps` shows it as healthy, and try again."
        )
    return sorted((Container(id, name.lstrip("/"), report) for _, _, id, name in found), key=lambda each: each.name)


@dataclass(frozen=True)
class ContainerReplica:
    """A rollout's steps in a container, which reads the archive from standard input.

    Args:
        seconds: as of `LocalReplica`.
    """

    container: Container
    model: str
    seconds: float

    @property
    def name(self) -> str:
        return self.container.name

    def prepare(self, archive: Path) -> Rollout:
        try:
            printed = self._run("prepare", content=archive, captured=True)
        except Interrupted as exc:
            if exc.failure:
                raise
            raise PreparedNevertheless(Rollout(**json.loads(exc.done.stdout))) from exc
        return Rollout(**json.loads(printed))

    def switch(self, rollout: Rollout) -> None:
        self._step("switch", rollout)

    def finish(self, rollout: Rollout) -> None:
        self._step("finish", rollout)

    def undo(self, rollout: Rollout) -> None:
        try:
            self._step("undo", rollout)
        except Interrupted as exc:  # it has ended nevertheless, and the other replicas are to undo, too
            if exc.failure:
                raise exc.failure from exc

    def _step(self, step: str, rollout: Rollout) -> None:
        self._run(step, "--rollout", json.dumps(asdict(rollout)))

    def _run(self, step: str, *options: str, content: Path | None = None, captured: bool = False) -> str:
        command = ("rollout-step", step, self.model, "--timeout", str(self.seconds), *options)
        return self.container.run(*command, content=content, captured=captured)
