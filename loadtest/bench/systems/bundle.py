"""The bundle as shipped: `python -m bundle serve MODEL`, with the settings in the model's folder."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bundle import machine
from bundle.server.settings import Settings
from loadtest.bench import resnet
from loadtest.bench.cases import Case
from loadtest.bench.systems.base import Endpoint, first
from loadtest.bench.systems.processes import wait_for_answer, workplace

RUN = "run"  # folder of the server's record and logs, in its workplace


class Bundle:
    name = "bundle"

    @property
    def version(self) -> str:
        return machine.commit()

    def install(self) -> None:
        """Do nothing: the benchmark runs in the bundle's own environment."""

    @contextmanager
    def serve(self, case: Case) -> Iterator[Endpoint]:
        if case.model == resnet.NAME:
            resnet.make()
        headers = {"Content-Type": case.content_type}
        with workplace(f"{self.name}-{case.name}") as place:
            settings = Settings.isolated(resnet.STORE)
            run_dir = place.folder / RUN
            command = [sys.executable, "-m", "bundle", "serve", case.model]
            own = {"BUNDLE_MODELS": str(case.folder.parent), "RUN_DIR": str(run_dir)}
            server = place.start(command, **settings.overrides, **own)
            if server.wait():
                raise place.failure("`python -m bundle serve` failed.")
            url = f"{settings.url('inference_address')}/predictions/{case.model}"
            wait_for_answer(place, None, url, headers, case.body, first)
            record = json.loads((run_dir / "server.json").read_text())
            yield Endpoint(url, headers, case.body, record["pid"])
