"""BentoML: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html"""

import base64
import os
import sys
from pathlib import Path

import bentoml

from loadtest.bench.peers import task, workers
from loadtest.bench.pipeline import Pipeline

# BentoML imports this module by itself, in each worker, where there is no command line
CASE = os.environ.get("BENCH_CASE", "mnist")
BATCH_SIZE = int(os.environ.get("BENCH_BATCH_SIZE", "2"))
LATENCY = 60_000  # ms, its default: a request that is expected to wait for longer is refused


@bentoml.service(workers=workers(), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Model:
    def __init__(self):
        self.pipeline = Pipeline(CASE, threads=1)

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=BATCH_SIZE, max_latency_ms=LATENCY)
    def predict(self, inputs: list[str]) -> list[dict]:
        return self.pipeline.predict([self.pipeline.decode(base64.b64decode(text)) for text in inputs])


if __name__ == "__main__":
    asked = task()  # BentoML finds out by itself how long a batch waits: there is no setting for the delay
    os.environ |= {"BENCH_CASE": asked.case, "BENCH_BATCH_SIZE": str(asked.batch_size)}
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(Path.cwd())}
    program = str(Path(sys.executable).with_name("bentoml"))
    service = "loadtest.bench.peers.bento:Model"
    os.execv(program, [program, "serve", service, "--host", "127.0.0.1", "--port", str(asked.port)])
