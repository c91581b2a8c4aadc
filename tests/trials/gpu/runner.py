"""Run the steps, each in a process of its own: a step that crashes or hangs does not stop the others."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bundle.cli.console import note
from bundle.paths import ROOT
from tests.trials.gpu.record import END, Record, Result

GRACE_SECONDS = 20  # how long an interrupted step has to stop its server
SHORTEST = 5.0  # s; with less time, a step is not started
TAIL = 20  # lines of a step's log in the report


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Attributes:
        command: it exits with 0 if it ran to its end, also if checks failed; they are in the record.
        limit: seconds.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float


def run_steps(steps: list[Step], record: Record, seconds: float, environment: dict[str, str] | None = None) -> bool:
    """Run the steps that have not passed yet.

    Args:
        seconds: for all steps together. Those that are not started in time fail.
        environment: further variables for the steps.

    Returns:
        whether all steps have passed, now or before.
    """
    deadline = time.monotonic() + seconds
    for step in steps:
        if record.has_passed(step.name):
            note(f"{step.title}: passed before")
            continue
        start, left = time.monotonic(), deadline - time.monotonic()
        if left < SHORTEST:
            cause = "It was not run: the time was up. Run the command again; it continues here."
        else:
            note(f"{step.title}: at most {min(step.limit, left):.0f} s")
            cause = run_step(step, record, min(step.limit, left), environment or {})
        taken = time.monotonic() - start
        passed = not cause and all(each.passed is not False for each in record.of(step.name))
        record.add(Result(step.name, END, passed, taken, cause))
        note(f"{step.title}: {'passed' if passed else 'FAILED'} in {taken:.0f} s")
    return all(record.has_passed(step.name) for step in steps)


def run_step(step: Step, record: Record, seconds: float, environment: dict[str, str]) -> str:
    """Run a step's command, and return why it failed, or ""."""
    log = record.folder / f"{step.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=heed_interrupts,
        )  # fmt: skip
        try:
            status, cause = process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            status, cause = 0, f"It timed out after {seconds:.0f} s."
        finally:
            end(process, record.folder)
    if not status and not cause:
        return ""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
    return f"{cause or f'It exited with {status}.'}\n{tail}".strip()


def heed_interrupts() -> None:
    """Undo what a shell does to a job in the background, and the job's children inherit: SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen, folder: Path) -> None:
    """Interrupt a step, so that it stops its server; kill what is left of it."""
    if process.poll() is None:
        send(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    send(process.pid, signal.SIGKILL)
    process.wait()
    for each in psutil.process_iter():  # a server has a session of its own
        with suppress(psutil.Error):
            if each.environ().get("RUN_DIR", "").startswith(f"{folder}{os.sep}"):
                each.kill()


def send(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
