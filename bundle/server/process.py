"""Start, find and stop one TorchServe on this machine."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from ts.model_server import TS_NAMESPACE

from bundle import signing
from bundle.catalog import ModelFolder
from bundle.digests import digest
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.paths import ROOT
from bundle.server import frontend
from bundle.server.client import Client
from bundle.server.identity import start_mark, start_mark_of_command
from bundle.server.java import java_home
from bundle.server.keys import Keys
from bundle.server.settings import ADDRESSES, Settings
from bundle.server.sockets import check_temporary
from bundle.server.space import check_space
from bundle.signing import key_of

GUARDS = ROOT / "bundle" / "bin"  # the commands that start workers: see bundle/guard.py
# TorchServe starts its workers with its own Python, and has no setting for another one
LAUNCH = "import sys; sys.executable = sys.argv.pop(1); from ts.model_server import start; start()"
TERMINATE_SECONDS, KILL_SECONDS = 30, 5  # how long processes have to end after SIGTERM, and after SIGKILL


@dataclass(frozen=True)
class Running:
    """A server that was started here, as recorded in its run folder.

    Attributes:
        pid, started: the Java process; the mark of its start, because process ids are reused. While it is being
            launched, 0 and "".
        temporary: the folder of its sockets, unpacked archives and pid file.
        served: digest of each served archive, by model.
        settings: `Settings.fingerprint` at its start; {} if an earlier bundle started it.
        inference, management: base URLs.
        grpc: host:port of gRPC inference.
        key_file: file with its keys; "" if it does not require tokens.
    """

    pid: int
    started: str
    temporary: str
    served: dict[str, str]
    settings: dict[str, str]
    inference: str
    management: str
    grpc: str
    key_file: str = ""

    @classmethod
    def read(cls, record: Path) -> "Running | None":
        """Return the server of a record; None if the record is missing or invalid."""
        try:
            values = json.loads(record.read_text())
            if values.pop("created", None) is not None:
                # Earlier bundles recorded a start time of the wall clock, which the clock's changes made wrong.
                # TorchServe has the name of its temporary folder, which is unique, on its command line.
                values["started"] = start_mark_of_command(values["pid"], values["temporary"])
            if isinstance(values["settings"], str):  # earlier bundles recorded one digest of all settings
                values["settings"] = {}
            recorded = cls(**values)
            return recorded.launched() if recorded.pid == 0 else recorded
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def launched(self) -> "Running":
        """Return this server with its Java process, if it was launched before its command was killed."""
        process = launched(self.temporary)
        mark = start_mark_of_command(process.pid, self.temporary) if process else ""
        return replace(self, pid=process.pid, started=mark) if process and mark else self

    def keys(self) -> Keys | None:
        return Keys(Path(self.key_file), self.management) if self.key_file else None

    def client(self) -> Client:
        return Client(self.inference, self.management, self.keys())

    def process(self) -> psutil.Process | None:
        """Return the Java process; None if it has ended."""
        if self.pid == 0:
            return None
        try:
            process = psutil.Process(self.pid)
            return process if start_mark(self.pid) == self.started and lives(process) else None
        except psutil.NoSuchProcess:
            return None


class Server:
    """Start, find and stop TorchServe.

    Args:
        run_dir: folder of its record and logs; by default $RUN_DIR, or build/run.

    Attributes:
        store: folder of its archives.
    """

    def __init__(self, run_dir: Path | None = None, settings: Settings | None = None):
        # absolute, because TorchServe starts in it, and would look for a relative folder of logs inside
        self.run_dir = (run_dir or Path(os.environ.get("RUN_DIR", ROOT / "build" / "run"))).absolute()
        self.settings = settings or Settings()
        self.store = ROOT / self.settings["model_store"]
        self.logs = self.run_dir / "logs"
        self.record = self.run_dir / "server.json"
        self.key_file = self.run_dir / "key_file.json"  # TorchServe's name for it, in the folder that it is started in

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run folder against other commands that start or stop its server.

        Raises:
            BundleError: another command holds the lock, or this user cannot write in the folder.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.run_dir / "lock").acquire(timeout=0)
        except Timeout as exc:
            raise BundleError(
                "Another `make serve`, `make stop` or `make tune` is running here. Wait until it has ended."
            ) from exc
        except OSError as exc:
            raise BundleError(f"Cannot write {exc.filename}: {exc.strerror}. Set RUN_DIR to another folder.") from exc
        with held:
            yield

    def running(self) -> Running | None:
        """Return this run folder's server; None if it does not run."""
        found = Running.read(self.record)
        return found if found and found.process() else None

    def archive(self, folder: ModelFolder) -> Path:
        return self.store / f"{folder.name}.mar"

    def archive_digests(self, folders: list[ModelFolder]) -> dict[str, str]:
        """Return the SHA-256 digest of each model's archive, as in `Running.served`."""
        return {folder.name: digest(self.archive(folder).read_bytes()) for folder in folders}

    def adopt(self, running: Running, folder: ModelFolder) -> Running:
        """Record that the running server serves the archive that is now in the store, and return the new record."""
        adopted = replace(running, served=running.served | self.archive_digests([folder]))
        self.write_record(adopted)
        return adopted

    def write_record(self, running: Running) -> None:
        """Write the record, readable by its owner only: the digest of a short password tells the password."""
        self.record.touch(mode=0o600)
        self.record.chmod(0o600)  # an earlier bundle's record
        write_atomically(self.record, json.dumps(asdict(running), indent=2))

    def start(self, folders: list[ModelFolder]) -> Running:
        """Start TorchServe with the archives of these models, and return as soon as its process runs.

        Raises:
            BundleError: `check` failed, the disk is full, or the process ended at once.
        """
        self.check(folders)
        self.stop()  # what a killed server has left
        check_space(map(self.archive, folders))
        environment = {
            **frontend.with_agent(self.settings.passed_on()),
            "BUNDLE_PYTHON": sys.executable,
            "TRUSTED_KEY": str(key_of("TRUSTED_KEY") or ""),  # "", because no worker starts without it
            "PATH": f"{GUARDS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "JAVA_HOME": str(java_home()),
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
        }
        served, settings = self.archive_digests(folders), self.settings.fingerprint()
        command = [sys.executable, "-c", LAUNCH, str(GUARDS / "python"), "--start"]
        command += ["--ts-config", str(self.settings.file), "--model-store", str(self.store)]
        # TorchServe reads snapshots only without --ts-config, and writes a keystore's password into them
        command += ["--no-config-snapshots"]
        command += ["--log-config", str(log_config)] if (log_config := self.settings.log_config) else []
        command += ["--models", *(f"{name}={name}.mar" for name in served)] if served else []
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.forget_keys()
        if self.settings.asks_for_keys:
            self.key_file.touch(mode=0o600)  # TorchServe restricts access only after it has written the keys
        # outside the project, because a socket's path is limited to about 100 characters
        temporary = tempfile.mkdtemp(prefix="torchserve-")
        environment |= {"TMPDIR": temporary, "TEMP": temporary}  # for the launcher's pid file and for java.io.tmpdir
        running = Running(
            pid=0,
            started="",
            temporary=temporary,
            served=served,
            settings=settings,
            inference=self.settings.url("inference_address"),
            management=self.settings.url("management_address"),
            grpc=self.settings.grpc_target(),
            key_file=str(self.key_file.resolve()) if self.settings.asks_for_keys else "",
        )
        try:
            self.write_record(running)  # before the launch: `stop` then finds it if this process is killed
            if frontend.is_off(environment):
                self.console.write_text(frontend.ALL_OFF)
            with self.console.open("ab") as console:
                subprocess.run(
                    command, cwd=self.run_dir, env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                )  # fmt: skip
            process = launched(temporary)
            if process is None:
                raise BundleError("TorchServe did not start.", self.console.read_text(errors="replace"))
            running = replace(running, pid=process.pid, started=start_mark(process.pid))
            self.write_record(running)
        except BaseException:
            # Ctrl-C and a full disk included: a server without a record could not be stopped later
            end(launched(temporary))
            shutil.rmtree(temporary, ignore_errors=True)
            self.record.unlink(missing_ok=True)
            self.forget_keys()
            raise
        return running

    @property
    def console(self) -> Path:
        """What Java prints before its logging starts: an invalid option, a heap that is too large."""
        return self.logs / "console.log"

    def check(self, folders: list[ModelFolder]) -> None:
        """Check what a start needs. Call it before stopping a server for a restart.

        Raises:
            BundleError: a setting is invalid, TMPDIR is full or its path is too long, Java is missing or cannot load
                the frontend's agent, a port is taken, or an archive was changed since it was built or signed.
        """
        self.settings.check()
        check_temporary()
        frontend.check(java_home(), self.settings.passed_on())
        self.check_ports()
        trusted = key_of("TRUSTED_KEY")
        for folder in folders:
            signing.check(self.archive(folder), trusted)

    def check_ports(self) -> None:
        """Check that TorchServe can listen on its ports.

        Raises:
            BundleError: another process has a port, or the address is not of this machine.
        """
        own = self.listening_ports()  # a restart frees them
        for key, (host, port) in self.settings.listeners().items():
            if port in own:
                continue
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as exc:
                    example = "http://127.0.0.1:9080" if key in ADDRESSES else "9070"
                    taken = exc.errno == errno.EADDRINUSE
                    why = f"is taken{port_owner(port)}" if taken else f"of {host} cannot be used: {exc.strerror}"
                    raise BundleError(
                        f"Port {port} ({key}) {why}. Set another one, TS_{key.upper()}={example} make serve"
                        + (", or end the process that has it." if taken else ".")
                    ) from exc

    def listening_ports(self) -> set[int]:
        """Return the ports that this run folder's server listens on."""
        running = self.running()
        try:
            held = psutil.Process(running.pid).net_connections("tcp") if running else []
        except psutil.Error:  # it has just ended
            return set()
        return {connection.laddr.port for connection in held if connection.status == psutil.CONN_LISTEN}

    def stop(self) -> bool:
        """End the server and its workers, and remove its record, keys and temporary folder.

        Returns:
            whether it was running.

        Raises:
            BundleError: the server cannot be ended; everything that belongs to it is left in place.
        """
        recorded = Running.read(self.record)
        if recorded is None:
            return False
        process = recorded.process()
        end(process)
        shutil.rmtree(recorded.temporary, ignore_errors=True)
        self.record.unlink(missing_ok=True)
        self.forget_keys()
        return process is not None

    def forget_keys(self) -> None:
        for file in (self.key_file, self.key_file.with_suffix(".lock")):
            file.unlink(missing_ok=True)


def launched(temporary: str) -> psutil.Process | None:
    """Return the Java process that was launched with this temporary folder; None if it has ended."""
    try:
        return psutil.Process(int((Path(temporary) / ".model_server.pid").read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def end(process: psutil.Process | None) -> None:
    """Send SIGTERM to a server, then SIGKILL to what is left of it and its workers.

    Raises:
        BundleError: a process belongs to another user, or survives SIGKILL.
    """
    if process is None:
        return
    try:
        family = [process, *process.children(recursive=True)]
        send(signal.SIGTERM, [process])
        _, left = psutil.wait_procs(family, timeout=TERMINATE_SECONDS)
        send(signal.SIGKILL, left)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as exc:
        raise BundleError(f"PID {exc.pid} belongs to another user. Stop it as that user.") from exc
    _, left = psutil.wait_procs(left, timeout=KILL_SECONDS)
    if pids := [str(survivor.pid) for survivor in left if lives(survivor)]:
        raise BundleError(f"PID {', '.join(pids)} survived SIGKILL. Wait until the system has ended it: make stop")


def send(number: int, processes: list[psutil.Process]) -> None:
    """Send a signal to the processes that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def port_owner(port: int) -> str:
    """Return ` by PID 12 (java)` for the process that listens on a port; "" if the system does not show it."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                process = psutil.Process(connection.pid)
                name = "a TorchServe" if TS_NAMESPACE in " ".join(process.cmdline()) else process.name()
                return f" by PID {connection.pid} ({name})"
    except psutil.Error:
        pass
    return ""
