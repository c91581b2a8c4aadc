"""The reference pipeline behind LitServe (https://lightning.ai/docs/litserve)."""

from typing import Annotated

import litserve
from fastapi import Body

from loadtest.bench.peers import Task, task, workers
from loadtest.bench.pipeline import Pipeline

# cores left to the HTTP server's process: for small models, one worker was faster than two (not tried for audio)
FOR_HTTP = {"mnist": 1, "text": 1, "molecule": 1}  # of other cases: none


class API(litserve.LitAPI):
    def __init__(self, served: Task):
        super().__init__(max_batch_size=served.batch_size, batch_timeout=served.delay)
        self.case = served.case

    def setup(self, device: str) -> None:
        self.pipeline = Pipeline(self.case, threads=1)

    def decode_request(self, request: Annotated[bytes, Body()]):
        """Decode the raw body, which FastAPI passes because of the annotation."""
        return self.pipeline.decode(request)

    def batch(self, inputs: list) -> list:
        return inputs

    def predict(self, inputs: list) -> list[dict]:
        return self.pipeline.predict(inputs)

    def unbatch(self, outputs: list[dict]) -> list[dict]:
        return outputs


if __name__ == "__main__":
    served = task()
    count = max(1, workers() - FOR_HTTP.get(served.case, 0))
    server = litserve.LitServer(API(served), accelerator="cpu", workers_per_device=count, fast_queue=True)
    quiet = {"generate_client_file": False, "log_level": "warning", "access_log": False}
    server.run(host="127.0.0.1", port=served.port, num_api_servers=1, **quiet)
