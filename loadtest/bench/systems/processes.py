"""Start a server, and end all processes that it has started."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from bundle.errors import BundleError
from loadtest.bench.paths import ROOT, WORK

MARK = (
    "BENCH_PROCESS"  # environment variable that identifies a server's processes, also those that have left their parent
)
LOGS = WORK / "logs"
START_SECONDS = 180
STOP_SECONDS = 2  # a process that ignores SIGTERM longer is killed, such as LitServe's workers
LAST_LINES = 30  # lines of the log that are shown if a server does not start
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end this program


class Workplace:
    """The folder, the log and the environment of one server.

    Attributes:
        folder: a temporary folder; its path is short because it contains sockets.
        environment: environment variables of the server's processes; one of them marks these.
    """

    def __init__(self, name: str):
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self.log.write_bytes(b"")
        self.started: list[subprocess.Popen] = []
        # settings of this process are not meant for the servers
        own = ("TS_", "BUNDLE_", "RUN_DIR", "PYTHON", "VIRTUAL_ENV", "OMP_", "MKL_")
        peers = ("BENCH_", "MOSEC_", "BENTOML_", "MLSERVER_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(own + peers)}
        self.environment = inherited | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.folder),
            "COLUMNS": "160",
        }

    def start(self, command: Sequence[str | Path], **environment: str) -> subprocess.Popen:
        """Run a command in the folder, with its output in the log, unaffected by this terminal's Ctrl-C."""
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
    """Make a workplace; at the end of the block, end every process that was started in it.

    Args:
        name: name of the log file in build/bench/logs.
    """
    place = Workplace(name)
    try:
        yield place
    finally:
        with signals_deferred():
            end(place)
            shutil.rmtree(place.folder, ignore_errors=True)


def end(place: Workplace) -> None:
    """Send SIGTERM to all processes at once, so that no parent restarts its workers, then SIGKILL to the rest."""
    deadline = time.monotonic() + STOP_SECONDS
    terminated: set[int] = set()
    while left := place.processes():
        late = time.monotonic() > deadline
        for process in left:
            try:
                if late:
                    process.kill()
                elif process.pid not in terminated:
                    terminated.add(process.pid)
                    process.terminate()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=0.5)
        if time.monotonic() > deadline + STOP_SECONDS:
            break
    for child in place.started:
        child.poll()  # otherwise an ended child stays a zombie


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer signals that end this program until after the block, so that it does not leave processes behind."""
    late = []
    try:
        before = {number: signal.signal(number, lambda number, _: late.append(number)) for number in ENDING}
    except ValueError:  # only the main thread can handle signals
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
    """Send requests until the server answers with a ranking.

    Args:
        place: the server's workplace.
        server: the process that ends with the server; None if there is no such process.
        url: the URL to POST to.
        headers: the headers of the request.
        body: the body of the request.
        top: returns the first class of an answer.

    Raises:
        BundleError: the server ended, or did not answer within START_SECONDS.
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
