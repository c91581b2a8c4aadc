"""The reference pipeline behind MLServer (https://docs.seldon.ai/mlserver)."""

import base64
import json
import os
import sys
from pathlib import Path

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from bundle.server.ports import free_ports
from loadtest.bench.peers import Task, task, workers
from loadtest.bench.pipeline import Pipeline


class Model(MLModel):
    """A model that takes BYTES as base64, and answers with a JSON string for each."""

    async def load(self) -> bool:
        self.pipeline = Pipeline(self.settings.parameters.extra["case"], threads=1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data = payload.inputs[0].data
        samples = [self.pipeline.decode(base64.b64decode(item)) for item in getattr(data, "root", data)]
        answers = [json.dumps(answer) for answer in self.pipeline.predict(samples)]
        output = ResponseOutput(name="answer", shape=[len(answers)], datatype="BYTES", data=answers)
        return InferenceResponse(model_name=self.name, outputs=[output])


def configure(folder: Path, served: Task) -> None:
    """Write the settings that `mlserver start` reads."""
    grpc, metrics = free_ports(2)
    settings = {
        "host": "127.0.0.1",
        "http_port": served.port,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "metrics_dir": str(folder / "metrics"),
        "environments_dir": str(folder / "environments"),
        "debug": False,  # True logs a line for each request
        "gzip_enabled": False,
        "parallel_workers": workers(),
    }
    model = {
        "name": "model",
        "implementation": "loadtest.bench.peers.mls.Model",
        "max_batch_size": served.batch_size,
        "max_batch_time": served.delay,
        "parameters": {"extra": {"case": served.case}},
    }
    (folder / "metrics").mkdir()
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))


if __name__ == "__main__":
    configure(Path.cwd(), task())
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execv(program, [program, "start", "."])
