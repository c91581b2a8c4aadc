"""LitServe: https://lightning.ai/docs/litserve"""

from typing import Annotated

import litserve
from fastapi import Body

from loadtest.bench.peers import Task, task, workers
from loadtest.bench.pipeline import Pipeline

# cores left to its HTTP server, a process of its own: for small models one worker was faster than two (audio not tried)
FOR_HTTP = {"mnist": 1, "text": 1, "audio": 0, "photo": 0, "photo-12mp": 0}


class API(litserve.LitAPI):
    def __init__(self, asked: Task):
        super().__init__(max_batch_size=asked.batch_size, batch_timeout=asked.delay)
        self.case = asked.case

    def setup(self, device: str) -> None:
        self.pipeline = Pipeline(self.case, threads=1)

    def decode_request(self, request: Annotated[bytes, Body()]):
        """The raw body, as FastAPI hands it over where the type of the request says so."""
        return self.pipeline.decode(request)

    def batch(self, inputs: list) -> list:
        return inputs

    def predict(self, inputs: list) -> list[dict]:
        return self.pipeline.predict(inputs)

    def unbatch(self, outputs: list[dict]) -> list[dict]:
        return outputs


if __name__ == "__main__":
    asked = task()
    count = max(1, workers() - FOR_HTTP[asked.case])
    server = litserve.LitServer(API(asked), accelerator="cpu", workers_per_device=count, fast_queue=True)
    quiet = {"generate_client_file": False, "log_level": "warning", "access_log": False}
    server.run(host="127.0.0.1", port=asked.port, num_api_servers=1, **quiet)
