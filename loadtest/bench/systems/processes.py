"""Starting a server and ending everything that it has started."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from bundle.errors import BundleError
from loadtest.bench.paths import ROOT, WORK

MARK = "BENCH_PROCESS"  # an environment variable that finds a process again, even one that left its parent
LOGS = WORK / "logs"
START_SECONDS = 180
STOP_SECONDS = 5  # what ignores SIGTERM for so long is killed: LitServe's workers do
LAST_LINES = 30  # of a log, shown when a server does not start
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they ask this program to end


class Workplace:
    """Where one server lives: a folder of its own, a log, an environment that marks its processes.

    Attributes:
        folder: temporary, with a short path, because sockets lie in it.
        environment: of every process of the server.
    """

    def __init__(self, name: str):
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self.log.write_bytes(b"")
        self.started: list[subprocess.Popen] = []
        # what is set for this process is not meant for the servers
        own = ("TS_", "BUNDLE_", "RUN_DIR", "PYTHON", "VIRTUAL_ENV", "OMP_", "MKL_", "BENCH_", "RAY_", "BENTOML_")
        own += ("MLSERVER_",)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        self.environment = inherited | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.folder),
            "COLUMNS": "160",
        }

    def start(self, command: list[str | Path], **environment: str) -> subprocess.Popen:
        """Runs a command in the folder, its output in the log, out of reach of this terminal's Ctrl-C."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def failure(self, message: str) -> BundleError:
        lines = self.log.read_text(errors="replace").splitlines()
        return BundleError(f"{message} Its log is {self.log}.", "\n".join(lines[-LAST_LINES:]))

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if environment_of(process).get(MARK) == self.mark]


@contextmanager
def workplace(name: str) -> Iterator[Workplace]:
    """A workplace; with the block ends every process that was started in it.

    Args:
        name: of the log file, in build/bench/logs.
    """
    place = Workplace(name)
    try:
        yield place
    finally:
        with signals_deferred():
            end(place)
            shutil.rmtree(place.folder, ignore_errors=True)


def end(place: Workplace) -> None:
    """SIGTERM to all, so that a parent does not start its workers again; SIGKILL to what is left."""
    deadline = time.monotonic() + STOP_SECONDS
    asked: set[int] = set()
    while left := place.processes():
        late = time.monotonic() > deadline
        for process in left:
            try:
                if late:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=0.5)
        if time.monotonic() > deadline + STOP_SECONDS:
            break
    for process in place.started:
        process.poll()  # a child that nobody waits for stays a zombie


@contextmanager
def signals_deferred() -> Iterator[None]:
    """What asks this program to end during the block does so after it: no half of the processes is left behind."""
    late = []
    try:
        before = {number: signal.signal(number, lambda number, _: late.append(number)) for number in ENDING}
    except ValueError:  # not the main thread, which alone handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if late:
            signal.raise_signal(late[0])


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def wait_for_answer(
    place: Workplace,
    server: subprocess.Popen | None,
    url: str,
    headers: dict[str, str],
    body: bytes,
    top: Callable[[bytes], tuple[int, float]],
) -> None:
    """Asks until the server answers with a ranking.

    Args:
        server: the process that lives as long as the server does, where there is one.

    Raises:
        BundleError: it ended, or did not answer within START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    last = "nothing"
    with requests.Session() as session:
        session.trust_env = False
        while time.monotonic() < deadline:
            if server and server.poll() is not None:
                raise place.failure(f"The server ended with status {server.returncode} before it answered.")
            try:
                answer = session.post(url, data=body, headers=headers, timeout=30)
                last = f"status {answer.status_code}, {answer.text[:300]!r}"
                if answer.ok:
                    top(answer.content)
                    return
            except (requests.RequestException, ValueError) as exc:
                last = str(exc)[:300]
            time.sleep(0.3)
    raise place.failure(f"The server did not answer within {START_SECONDS} s; the last answer was {last}.")
