"""Run commands of the host in the TorchServe containers of the Docker stack."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from bundle.errors import BundleError, NotRunning
from bundle.server.rollout import PreparedNevertheless, Rollout

BUNDLE = (".venv/bin/python", "-m", "bundle")
INSPECTED = '{{index .Config.Labels "com.docker.compose.project"}} {{.State.Status}} '
# a container that was never started, or has no check, has no field Health
INSPECTED += '{{with index .State "Health"}}{{.Status}}{{else}}none{{end}} {{.Id}} {{.Name}}'


LISTING_SECONDS = 60


class Unavailable(BundleError):
    """Docker does not list the stack's containers."""


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

    def run(self, *arguments: str, content: Path | None = None) -> str:
        """Run a command of the bundle in the container, report its standard error, and return its standard output.

        Args:
            content: a file for the command's standard input.

        Raises:
            NotRunning: it failed because TorchServe is not running, or does not serve the model.
            BundleError: it failed for another reason; its standard error says why.
            Interrupted: Ctrl-C came meanwhile. Docker does not pass it on, so that the command ran to its end.
        """
        interrupt = None
        with (content or Path(os.devnull)).open("rb") as stream, ThreadPoolExecutor(1) as pool:
            # in a thread, because Ctrl-C interrupts the main thread alone
            ending = pool.submit(self._run, ["docker", "exec", "--interactive", self.id, *BUNDLE, *arguments], stream)
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
        return done.stdout

    def _run(self, command: list[str], stream: IO) -> subprocess.CompletedProcess:
        """Run a command to its end, and report each line of its standard error with the name of the container."""
        with (
            subprocess.Popen(
                command,
                stdin=stream,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # the terminal sends Ctrl-C to the whole session
            ) as process,
            ThreadPoolExecutor(1) as pool,
        ):
            assert process.stdout
            assert process.stderr
            printed = pool.submit(process.stdout.read)
            for line in process.stderr:
                self.report(f"{self.name}: {line.rstrip()}")
        return subprocess.CompletedProcess(command, process.returncode, printed.result())


@dataclass(frozen=True)
class Stack:
    """A Docker stack that runs, perhaps in part.

    Args:
        project: its name.
        running: the TorchServe containers that run, also unhealthy ones: a change may mend them.
        stopped: the names of those that do not run.
        starting: the names of those that run, and are not ready yet.
    """

    project: str
    running: list[Container]
    stopped: list[str]
    starting: list[str]

    @property
    def replicas(self) -> int:
        return len(self.running) + len(self.stopped)

    def check_change(self) -> None:
        """Check that a change reaches all replicas, and stays.

        Raises:
            BundleError: a container does not run, or is starting.
        """
        if self.stopped:
            raise BundleError(f"{self.why_stopped()}, so not all replicas would change. {self.how_to_start()}")
        if self.starting:
            them, they = ("them", "they restore") if len(self.starting) > 1 else ("it", "it restores")
            raise BundleError(
                f"{are(self.starting)} still starting, and would undo a change when {they} the state of before. "
                f"Wait until `docker ps` shows {them} as healthy, and try again."
            )

    def why_stopped(self) -> str:
        return f"{are(self.stopped)} not running"

    def how_to_start(self) -> str:
        return f"Start {'them' if len(self.stopped) > 1 else 'it'}: docker start {' '.join(self.stopped)}"


def are(names: list[str]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}"


def compose() -> list[str]:
    """Return the stack's compose command, which make sets; [] without it."""
    return shlex.split(os.environ.get("COMPOSE", ""))


def find(report: Callable[[str], object]) -> Stack | None:
    """Return the stack; None if none of its TorchServe containers runs.

    Args:
        report: gets lines for the user.

    Raises:
        Unavailable: Docker is not installed, does not run, or refuses this user.
    """
    command = compose()
    if not command:
        return None
    names = listed([*command, "ps", "-a", "-q", "torchserve"]).split()
    inspected = listed(["docker", "inspect", "--format", INSPECTED, *names]) if names else ""
    found = sorted((line.split() for line in inspected.splitlines()), key=lambda each: each[-1])
    running, stopped, starting = [], [], []
    for _, state, health, identity, slashed in found:
        name = slashed.lstrip("/")
        if state != "running":  # restarting, paused, exited or created
            stopped.append(name)
            continue
        running.append(Container(identity, name, report))
        if health == "starting":
            starting.append(name)
    return Stack(found[0][0], running, stopped, starting) if running else None


def listed(command: list[str]) -> str:
    """Return what a command of Docker prints.

    Raises:
        Unavailable: it fails, or takes too long.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LISTING_SECONDS).stdout
    except subprocess.CalledProcessError as exc:
        said = exc.stderr.strip().splitlines()[-1:] or [f"exit status {exc.returncode}"]
        raise Unavailable(f"Docker fails: {said[0]}") from exc
    except subprocess.TimeoutExpired as exc:
        raise Unavailable(f"Docker does not answer within {LISTING_SECONDS} s") from exc
    except OSError as exc:
        raise Unavailable(f"Docker cannot be called: {exc}") from exc


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
            printed = self._run("prepare", content=archive)
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

    def _run(self, step: str, *options: str, content: Path | None = None) -> str:
        command = ("rollout-step", step, self.model, "--timeout", str(self.seconds), *options)
        return self.container.run(*command, content=content)
