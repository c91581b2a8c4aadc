"""One TorchServe on this machine: its settings, its process, its files."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from ts.model_server import TS_NAMESPACE, load_properties

from bundle.catalog import MODEL_STORE, ROOT, ModelFolder
from bundle.client import Client
from bundle.errors import BundleError
from bundle.java import java_home

CONFIG = ROOT / "config.properties"
LOG_CONFIG = ROOT / "bundle" / "config" / "log4j2.xml"
ADDRESSES = ("inference_address", "management_address", "metrics_address")
GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")


class Settings:
    """config.properties under the environment: TS_<KEY> overrides a key, as TorchServe itself does it."""

    def __init__(self, file: Path = CONFIG):
        self.file = file
        self.values = load_properties(str(file))

    def __getitem__(self, key: str) -> str:
        return os.environ.get(f"TS_{key.upper()}", self.values[key])

    def url(self, key: str) -> str:
        """The address as a client on this machine calls it."""
        parts = urlsplit(self[key])
        host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port}"

    def ports(self) -> dict[str, int]:
        """Every port that TorchServe listens on, by its key."""
        ports = {key: urlsplit(self[key]).port for key in ADDRESSES}
        return ports | {key: int(self[key]) for key in GRPC_PORTS}

    def client(self) -> Client:
        return Client(self.url("inference_address"), self.url("management_address"))

    def fingerprint(self) -> str:
        overrides = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("TS_"))
        return hashlib.sha256(
            "\n".join([self.file.read_text(), LOG_CONFIG.read_text(), *overrides]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Running:
    """A server that was started here, as recorded in its run folder.

    Attributes:
        pid, created: the Java process; its start time, because process ids are used again.
        temporary: the folder of its sockets, unpacked archives and pid file.
        served: what it serves: {model: digest of its archive}.
        settings: `Settings.fingerprint` at its start.
    """

    pid: int
    created: float
    temporary: str
    served: dict[str, str]
    settings: str

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
    """

    def __init__(self, run_dir: Path | None = None, settings: Settings | None = None, store: Path = MODEL_STORE):
        self.run_dir = run_dir or Path(os.environ.get("RUN_DIR", ROOT / "build" / "run"))
        self.settings = settings or Settings()
        self.store = store
        self.logs = self.run_dir / "logs"
        self.record = self.run_dir / "server.json"

    def running(self) -> Running | None:
        """The server that was started from this run folder and lives."""
        try:
            found = Running(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.process() else None

    def wanted(self, folders: list[ModelFolder]) -> dict[str, str]:
        """What a server of these models would serve, as `Running.served` has it."""
        archives = {folder.name: self.store / f"{folder.name}.mar" for folder in folders}
        return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in archives.items()}

    def is_current(self, running: Running, folders: list[ModelFolder]) -> bool:
        return running.served == self.wanted(folders) and running.settings == self.settings.fingerprint()

    def start(self, folders: list[ModelFolder]) -> Running:
        """Starts TorchServe with the archives of these models, and returns as soon as its process lives.

        Raises:
            BundleError: no Java, a port that is taken, or a process that ended at once.
        """
        self.check_ports()
        names = [folder.name for folder in folders]
        home = java_home()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        # not below the project: a socket's path must not be longer than about 100 characters
        temporary = tempfile.mkdtemp(prefix="torchserve-")
        environment = {
            **os.environ,
            "JAVA_HOME": str(home),
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
            "TMPDIR": temporary,  # the wrapper's pid file
            "TEMP": temporary,  # java.io.tmpdir
        }
        command = [sys.executable, "-m", "ts.model_server", "--start", "--ts-config", str(self.settings.file)]
        command += ["--model-store", str(self.store), "--models", *(f"{name}={name}.mar" for name in names)]
        with self.console.open("wb") as console:
            subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=console,
                stderr=console,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        pid_file = Path(temporary) / ".model_server.pid"
        try:
            process = psutil.Process(int(pid_file.read_text()))
            found = Running(
                process.pid, process.create_time(), temporary, self.wanted(folders), self.settings.fingerprint()
            )
        except (OSError, ValueError, psutil.NoSuchProcess) as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            raise BundleError("TorchServe did not start.", self.console.read_text(errors="replace")) from exc
        self.record.write_text(json.dumps(asdict(found), indent=2))
        return found

    @property
    def console(self) -> Path:
        """What the Java process prints before its logging is up: a heap that does not fit, a wrong option."""
        return self.logs / "console.log"

    def check_ports(self) -> None:
        for key, port in self.settings.ports().items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as exc:
                    example = "http://127.0.0.1:9080" if key in ADDRESSES else "9070"
                    raise BundleError(
                        f"Port {port} ({key}) is taken{by_whom(port)}. End that program, "
                        f"or choose another port: TS_{key.upper()}={example} make serve"
                    ) from exc

    def stop(self, seconds: float = 30) -> bool:
        """Ends the server and its workers, and says whether there was one.

        SIGTERM first; what is left after `seconds` is killed.
        """
        running = self.running()
        if running is None:
            self.record.unlink(missing_ok=True)
            return False
        process = running.process()
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, left = psutil.wait_procs(family, timeout=seconds)
        for survivor in left:
            survivor.kill()
        psutil.wait_procs(left, timeout=5)
        shutil.rmtree(running.temporary, ignore_errors=True)
        self.record.unlink(missing_ok=True)
        return True


def by_whom(port: int) -> str:
    """ " by PID 12 (java)" where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                name = "a TorchServe" if TS_NAMESPACE in " ".join(process.cmdline()) else process.name()
                return f" by PID {connection.pid} ({name})"
    except psutil.Error:
        pass
    return ""
