"""One TorchServe on this machine: its process, its record, its files."""

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from ts.model_server import TS_NAMESPACE

from bundle import signing
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.files import write_atomically
from bundle.paths import ROOT
from bundle.server.client import Client
from bundle.server.java import java_home
from bundle.server.keys import Keys
from bundle.server.settings import ADDRESSES, Settings
from bundle.signing import key_of

GUARDS = ROOT / "bundle" / "bin"  # what workers are started with: see bundle/guard.py
# TorchServe starts workers with the Python that it was started with itself, and knows no other setting for it
LAUNCH = "import sys; sys.executable = sys.argv.pop(1); from ts.model_server import start; start()"


@dataclass(frozen=True)
class Running:
    """A server that was started here, as recorded in its run folder.

    Attributes:
        pid, created: the Java process; its start time, because process ids are used again.
        temporary: the folder of its sockets, unpacked archives and pid file.
        served: what it serves: {model: digest of its archive}.
        settings: `Settings.fingerprint` at its start.
        inference, management: base URLs.
        grpc: host:port of inference.
        key_file: of its keys; "" where it asks for none.
    """

    pid: int
    created: float
    temporary: str
    served: dict[str, str]
    settings: str
    inference: str
    management: str
    grpc: str
    key_file: str = ""

    def keys(self) -> Keys | None:
        return Keys(Path(self.key_file), self.management) if self.key_file else None

    def client(self) -> Client:
        return Client(self.inference, self.management, self.keys())

    def process(self) -> psutil.Process | None:
        """The Java process while it lives."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
            return process if alive else None
        except psutil.NoSuchProcess:
            return None


class Server:
    """Starts, finds and stops TorchServe.

    Args:
        run_dir: where its record and its logs are.

    Attributes:
        store: the folder of its archives.
    """

    def __init__(self, run_dir: Path | None = None, settings: Settings | None = None):
        self.run_dir = run_dir or Path(os.environ.get("RUN_DIR", ROOT / "build" / "run"))
        self.settings = settings or Settings()
        self.store = ROOT / self.settings["model_store"]
        self.logs = self.run_dir / "logs"
        self.record = self.run_dir / "server.json"
        self.key_file = self.run_dir / "key_file.json"  # TorchServe's name for it, in the folder that it is started in

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps a second `make serve` or `make stop` of this run folder out.

        Raises:
            BundleError: one is at work.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.run_dir / "lock", timeout=0):
                yield
        except Timeout as exc:
            raise BundleError(
                "Another `make serve`, `make stop` or `make tune` is at work here. Wait until it is done."
            ) from exc

    def running(self) -> Running | None:
        """The server that was started from this run folder and lives."""
        try:
            found = Running(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.process() else None

    def archive(self, folder: ModelFolder) -> Path:
        return self.store / f"{folder.name}.mar"

    def wanted(self, folders: list[ModelFolder]) -> dict[str, str]:
        """What a server of these models would serve, as `Running.served` has it."""
        archives = {folder.name: self.archive(folder) for folder in folders}
        return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in archives.items()}

    def is_current(self, running: Running, folders: list[ModelFolder]) -> bool:
        return running.served == self.wanted(folders) and running.settings == self.settings.fingerprint()

    def difference(self, running: Running, folders: list[ModelFolder]) -> str:
        """Why what runs is not what is asked for, in a sentence."""
        wanted = self.wanted(folders)
        if running.key_file and not self.settings.asks_for_keys:
            return "What runs asks for tokens. WITHOUT TS_DISABLE_TOKEN_AUTHORIZATION=false, AS NOW, IT WILL NOT."
        if running.served.keys() != wanted.keys():
            return f"What runs serves {', '.join(running.served)}, and not {', '.join(wanted)}."
        if changed := [name for name, digest in wanted.items() if running.served[name] != digest]:
            return f"What runs has other archives of {', '.join(changed)}."
        return "What runs has other settings (config.properties, bundle/config, TS_* or TRUSTED_KEY)."

    def adopt(self, running: Running, folder: ModelFolder) -> None:
        """Records that the running server serves the archive that is in the store now."""
        self.write_record(replace(running, served=running.served | self.wanted([folder])))

    def write_record(self, running: Running) -> None:
        write_atomically(self.record, json.dumps(asdict(running), indent=2))

    def start(self, folders: list[ModelFolder]) -> Running:
        """Starts TorchServe with the archives of these models, and returns as soon as its process lives.

        Raises:
            BundleError: what `check` finds, or a process that ended at once.
        """
        self.check(folders)
        environment = {
            **self.settings.passed_on(),
            "BUNDLE_PYTHON": sys.executable,
            "TRUSTED_KEY": str(key_of("TRUSTED_KEY") or ""),  # "", because without the variable no worker starts
            "PATH": f"{GUARDS}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "JAVA_HOME": str(java_home()),
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
        }
        wanted, settings = self.wanted(folders), self.settings.fingerprint()
        command = [sys.executable, "-c", LAUNCH, str(GUARDS / "python"), "--start"]
        command += ["--ts-config", str(self.settings.file), "--model-store", str(self.store)]
        # snapshots are read only where there is no --ts-config, and have a keystore's password in them
        command += ["--no-config-snapshots"]
        command += ["--log-config", str(log_config)] if (log_config := self.settings.log_config) else []
        command += ["--models", *(f"{name}={name}.mar" for name in wanted)] if wanted else []
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.forget_keys()
        if self.settings.asks_for_keys:
            self.key_file.touch(mode=0o600)  # TorchServe writes first, and restricts who may read afterwards
        # not below the project: a socket's path must not be longer than about 100 characters
        temporary = tempfile.mkdtemp(prefix="torchserve-")
        environment |= {"TMPDIR": temporary, "TEMP": temporary}  # of the wrapper's pid file, and java.io.tmpdir
        try:
            with self.console.open("wb") as console:
                streams = {"stdin": subprocess.DEVNULL, "stdout": console, "stderr": console}
                subprocess.run(command, cwd=self.run_dir, env=environment, start_new_session=True, **streams)
            process = launched(temporary)
            if process is None:
                raise BundleError("TorchServe did not start.", self.console.read_text(errors="replace"))
            running = Running(
                pid=process.pid,
                created=process.create_time(),
                temporary=temporary,
                served=wanted,
                settings=settings,
                inference=self.settings.url("inference_address"),
                management=self.settings.url("management_address"),
                grpc=f"{self.settings['grpc_inference_address']}:{self.settings['grpc_inference_port']}",
                key_file=str(self.key_file.resolve()) if self.settings.asks_for_keys else "",
            )
            self.write_record(running)
        except BaseException:
            # Ctrl-C and a full disk included: what has no record could not be stopped later
            end(launched(temporary))
            shutil.rmtree(temporary, ignore_errors=True)
            self.forget_keys()
            raise
        return running

    @property
    def console(self) -> Path:
        """What the Java process prints before its logging is up: a heap that does not fit, a wrong option."""
        return self.logs / "console.log"

    def check(self, folders: list[ModelFolder]) -> None:
        """To be asked before anything is stopped for a new start.

        Raises:
            BundleError: a setting that is none, no Java, a port that another holds, or an archive that is not what was
                built or signed.
        """
        self.settings.check()
        java_home()
        self.check_ports()
        trusted = key_of("TRUSTED_KEY")
        for folder in folders:
            signing.check(self.archive(folder), trusted)

    def check_ports(self) -> None:
        own = self.ports_held()  # free by the time of a new start
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
                    why = f"is taken{by_whom(port)}" if taken else f"cannot be used: {exc.strerror}"
                    raise BundleError(
                        f"Port {port} ({key}) {why}. Choose another port, TS_{key.upper()}={example} make serve, "
                        "or end what holds it."
                    ) from exc

    def ports_held(self) -> set[int]:
        """Of this run folder's server, if one runs."""
        running = self.running()
        try:
            held = psutil.Process(running.pid).net_connections("tcp") if running else []
        except psutil.Error:  # it has just ended
            return set()
        return {connection.laddr.port for connection in held if connection.status == psutil.CONN_LISTEN}

    def stop(self) -> bool:
        """Ends the server and its workers, and says whether there was one."""
        try:
            recorded = Running(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
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
    """The Java process whose wrapper wrote its pid file into `temporary`, while it lives."""
    try:
        return psutil.Process(int((Path(temporary) / ".model_server.pid").read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def end(process: psutil.Process | None, seconds: float = 30) -> None:
    """SIGTERM to the server; what is left of it and of its workers after `seconds` is killed."""
    if process is None:
        return
    try:
        family = [process, *process.children(recursive=True)]
        process.terminate()
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs(family, timeout=seconds)
    for survivor in left:
        survivor.kill()
    psutil.wait_procs(left, timeout=5)


def by_whom(port: int) -> str:
    """` by PID 12 (java)`, where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                name = "a TorchServe" if TS_NAMESPACE in " ".join(process.cmdline()) else process.name()
                return f" by PID {connection.pid} ({name})"
    except psutil.Error:
        pass
    return ""
