"""The reference pipeline behind Ray Serve (https://docs.ray.io/en/latest/serve)."""

import json
import os
import signal

# The settings of RAY_SERVE_THROUGHPUT_OPTIMIZED, without two: gRPC between proxy and replicas was slower, and ingress
# without a proxy needs a load balancer.
os.environ |= {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from loadtest.bench.peers import Task, task, workers

ONGOING = 2048  # requests that a replica accepts; more than clients
OBJECT_STORE = 200_000_000  # bytes; requests do not use it
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@serve.deployment(
    num_replicas=workers(), max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 0.5}, logging_config=QUIET
)
class Model:
    def __init__(self, served: Task):
        from loadtest.bench.pipeline import Pipeline  # imports torch, which only the replicas need

        self.pipeline = Pipeline(served.case, threads=1)
        self.answer.set_max_batch_size(served.batch_size)
        self.answer.set_batch_wait_timeout_s(served.delay)

    @serve.batch
    async def answer(self, bodies: list[bytes]) -> list[dict]:
        return self.pipeline.predict([self.pipeline.decode(body) for body in bodies])

    async def __call__(self, request: Request) -> Response:
        return Response(json.dumps(await self.answer(await request.body())), media_type="application/json")


if __name__ == "__main__":
    served = task()
    ray.init(
        num_cpus=workers(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["TMPDIR"],
    )
    serve.start(http_options={"host": "127.0.0.1", "port": served.port}, logging_config=QUIET)
    serve.run(Model.bind(served), route_prefix="/predict")  # type: ignore[attr-defined]  # added by the decorator
    signal.pause()
