"""The bundle as it is shipped: `python -m bundle serve MODEL`, with the settings of the model's own folder."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bundle.catalog import MODELS, ROOT
from bundle.ports import free_ports
from bundle.server import ADDRESSES, GRPC_PORTS
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.systems.base import Endpoint, first
from loadtest.bench.systems.processes import Workplace, wait_for_answer, workplace

RUN = "run"  # the folder of the server's record and logs, in its workplace
# the same commands, for model folders that are not in models/
ELSEWHERE = """\
import sys
from pathlib import Path
from bundle import catalog, cli
place = Path(sys.argv.pop(1))
catalog.folders = lambda: [catalog.ModelFolder(file.parent) for file in place.glob("*/model-config.yaml")]
cli.main()
"""


class Bundle:
    name = "bundle"

    @property
    def version(self) -> str:
        """The commit, and whether something was changed since."""
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        run = subprocess.run(git, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else "unknown"

    def install(self) -> None:
        """It is in the environment that this runs in."""

    @contextmanager
    def serve(self, case: Case) -> Iterator[Endpoint]:
        if case.model == resnet.NAME:
            resnet.make()
        headers = {"Content-Type": case.content_type}
        with workplace(f"{self.name}-{case.name}") as place:
            ports = dict(zip((*ADDRESSES, *GRPC_PORTS), free_ports(len(ADDRESSES) + len(GRPC_PORTS)), strict=True))
            server = place.start([*self.command(case), "serve", case.model], **self.settings(place, ports))
            if server.wait():
                raise place.failure("`python -m bundle serve` failed.")
            url = f"http://127.0.0.1:{ports['inference_address']}/predictions/{case.model}"
            wait_for_answer(place, None, url, headers, case.body, first)
            record = json.loads((place.folder / RUN / "server.json").read_text())
            yield Endpoint(url, headers, case.body, record["pid"])

    @staticmethod
    def command(case: Case) -> list[str]:
        if case.folder.parent == MODELS:
            return [sys.executable, "-m", "bundle"]
        return [sys.executable, "-c", ELSEWHERE, str(case.folder.parent)]

    @staticmethod
    def settings(place: Workplace, ports: dict[str, int]) -> dict[str, str]:
        """Ports, archives and a run folder of its own, by the variables that override config.properties."""
        addresses = {f"TS_{key.upper()}": f"http://127.0.0.1:{ports[key]}" for key in ADDRESSES}
        grpc = {f"TS_{key.upper()}": str(ports[key]) for key in GRPC_PORTS}
        return addresses | grpc | {"TS_MODEL_STORE": str(resnet.STORE), "RUN_DIR": str(place.folder / RUN)}
