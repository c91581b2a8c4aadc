"""The bundle as it is shipped: `python -m bundle serve MODEL`, with the settings of the model's own folder."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bundle.paths import MODELS, ROOT
from bundle.tuning.trial_server import own_settings
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.systems.base import Endpoint, first
from loadtest.bench.systems.processes import wait_for_answer, workplace

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
            settings = own_settings(resnet.STORE)
            del settings["load_models"]  # it is for a server without models, and would stand above what is asked for
            variables = {f"TS_{key.upper()}": value for key, value in settings.items()}
            run_dir = place.folder / RUN
            server = place.start([*self.command(case), "serve", case.model], **variables, RUN_DIR=str(run_dir))
            if server.wait():
                raise place.failure("`python -m bundle serve` failed.")
            url = f"{settings['inference_address']}/predictions/{case.model}"
            wait_for_answer(place, None, url, headers, case.body, first)
            record = json.loads((run_dir / "server.json").read_text())
            yield Endpoint(url, headers, case.body, record["pid"])

    @staticmethod
    def command(case: Case) -> list[str]:
        if case.folder.parent == MODELS:
            return [sys.executable, "-m", "bundle"]
        return [sys.executable, "-c", ELSEWHERE, str(case.folder.parent)]
