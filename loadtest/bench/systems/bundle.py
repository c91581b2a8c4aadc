"""The bundle as shipped: `python -m bundle serve MODEL`, with the settings in the model's folder; and its floor."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle import machine
from bundle.server.settings import Settings
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.results import FLOOR, OURS
from loadtest.bench.systems import floor
from loadtest.bench.systems.base import Endpoint, first
from loadtest.bench.systems.processes import wait_for_answer, workplace

RUN = "run"  # folder of the server's record and logs, in its workplace


class Bundle:
    name = OURS

    @property
    def version(self) -> str:
        return machine.commit()

    def install(self) -> None:
        """Do nothing: the benchmark runs in the bundle's own environment."""

    def model_folder(self, case: Case) -> Path:
        """Return the folder of the served model."""
        return case.folder

    @contextmanager
    def serve(self, case: Case) -> Iterator[Endpoint]:
        if case.model == resnet.NAME:
            resnet.make()
        model = self.model_folder(case)
        headers = {"Content-Type": case.content_type}
        with workplace(f"{self.name}-{case.name}") as place:
            settings = Settings.isolated(resnet.STORE)
            run_dir = place.folder / RUN
            command = [sys.executable, "-m", "bundle", "serve", model.name]
            own = {"BUNDLE_MODELS": str(model.parent), "RUN_DIR": str(run_dir)}
            server = place.start(command, **settings.overrides, **own)
            if server.wait():
                raise place.failure("`python -m bundle serve` failed.")
            url = f"{settings.url('inference_address')}/predictions/{model.name}"
            wait_for_answer(place, None, url, headers, case.body, first)
            record = json.loads((run_dir / "server.json").read_text())
            yield Endpoint(url, headers, case.body, record["pid"])


class Floor(Bundle):
    name = FLOOR

    def model_folder(self, case: Case) -> Path:
        return floor.make(case)
