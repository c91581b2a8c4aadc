"""The reference pipeline behind BentoML (https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html)."""

import base64
import os
import sys
from pathlib import Path

import bentoml

from loadtest.bench.peers import task, workers
from loadtest.bench.pipeline import Pipeline

# each of BentoML's workers imports this module, without the command line
CASE = os.environ.get("BENCH_CASE", "mnist")
BATCH_SIZE = int(os.environ.get("BENCH_BATCH_SIZE", "2"))
LATENCY = 60_000  # ms, the default: BentoML rejects a request that it expects to wait longer


@bentoml.service(workers=workers(), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Model:
    def __init__(self):
        self.pipeline = Pipeline(CASE, threads=1)

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=BATCH_SIZE, max_latency_ms=LATENCY)
    def predict(self, inputs: list[str]) -> list[dict]:
        return self.pipeline.predict([self.pipeline.decode(base64.b64decode(text)) for text in inputs])


if __name__ == "__main__":
    served = task()  # the delay is not used: BentoML adapts the wait for a batch itself
    os.environ |= {"BENCH_CASE": served.case, "BENCH_BATCH_SIZE": str(served.batch_size)}
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(Path.cwd())}
    program = str(Path(sys.executable).with_name("bentoml"))
    service = "loadtest.bench.peers.bento:Model"
    os.execv(program, [program, "serve", service, "--host", "127.0.0.1", "--port", str(served.port)])
