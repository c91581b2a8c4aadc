"""Stock TorchServe, with a handler like those of its examples."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from bundle.errors import BundleError
from bundle.server.java import java_home
from bundle.server.ports import free_ports
from bundle.server.settings import ADDRESSES, GRPC_PORTS
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.peers import workers
from loadtest.bench.systems.base import Endpoint, batching, first
from loadtest.bench.systems.processes import Workplace, wait_for_answer, workplace

HANDLER = Path(__file__).parent.parent / "peers" / "torchserve_handler.py"
QUEUE = 4096  # requests; more than clients. With the default of 100, some of 256 clients get a 503


@dataclass(frozen=True)
class TorchServe:
    """TorchServe with its default settings, one worker for each core and a long enough queue.

    Attributes:
        is_batched: whether it batches as the bundle does; by default, TorchServe does not batch.
    """

    name: str
    is_batched: bool = False

    @property
    def version(self) -> str:
        return version("torchserve")

    def install(self) -> None:
        """Do nothing: it is installed in the bundle's environment."""

    @contextmanager
    def serve(self, case: Case) -> Iterator[Endpoint]:
        if case.model == resnet.NAME:
            resnet.make()
        headers = {"Content-Type": case.content_type}
        with workplace(f"{self.name}-{case.name}") as place:
            port = self.configure(place)
            self.archive(place, case)
            command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
            command += ["--ts-config", "config.properties", "--model-store", ".", "--models", "model=model.mar"]
            server = place.start(command, JAVA_HOME=str(java_home()), TEMP=str(place.folder))
            url = f"http://127.0.0.1:{port}/predictions/model"
            wait_for_answer(place, server, url, headers, case.body, first)
            [java] = psutil.Process(server.pid).children()
            yield Endpoint(url, headers, case.body, java.pid)

    def configure(self, place: Workplace) -> int:
        """Write config.properties with free ports, and return the port of the inference API."""
        ports = free_ports(len(ADDRESSES) + len(GRPC_PORTS))
        lines = [f"{key}=http://127.0.0.1:{port}" for key, port in zip(ADDRESSES, ports, strict=False)]
        lines += [f"{key}={port}" for key, port in zip(GRPC_PORTS, ports[len(ADDRESSES) :], strict=True)]
        lines += ["disable_token_authorization=true", f"job_queue_size={QUEUE}"]
        (place.folder / "config.properties").write_text("\n".join(lines) + "\n")
        return ports[0]

    def archive(self, place: Workplace, case: Case) -> None:
        config = {
            "minWorkers": workers(),
            "maxWorkers": workers(),
            "responseTimeout": 120,
            "startupTimeout": 120,
            "jobQueueSize": QUEUE,
            "handler": {"case": case.name, "threads": 1},
        }
        if self.is_batched:
            wanted = batching(case)
            config |= {"batchSize": wanted.size, "maxBatchDelay": wanted.delay}
        (place.folder / "model-config.yaml").write_text(json.dumps(config))  # YAML contains JSON
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "model", "--version", "1.0"]
        command += ["--handler", str(HANDLER), "--config-file", "model-config.yaml", "--export-path", "."]
        run = subprocess.run(command, cwd=place.folder, env=place.environment, capture_output=True, text=True)
        if run.returncode:
            raise BundleError("torch-model-archiver failed.", run.stdout + run.stderr)


TORCHSERVES = (
    TorchServe("torchserve"),
    TorchServe("torchserve-batched", is_batched=True),
)
