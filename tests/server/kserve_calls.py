"""Make calls with KServe's own clients: a JSON object of calls on stdin, that of their results on stdout.

This program runs in the environment of requirements/kserve.txt, which has nothing of the bundle. All calls are made at
the same time.

    python kserve_calls.py URL GRPC_ADDRESS <<< '{"a name": {"protocol": "v2", "method": "is_server_live"}}'
"""

import asyncio
import base64
import json
import sys

import grpc
import httpx
import numpy
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, grpc_address = sys.argv[1:]


def tensor(name: str, datatype: str, data: list, binary: bool = True, **parameters: str) -> InferInput:
    """Return an input. The files of BYTES come in base64; as a binary tensor they are sent as bytes."""
    if datatype != "BYTES":
        array = numpy.array(data, {"UINT8": "u1", "INT64": "i8", "FP32": "f4"}[datatype])
    else:
        array = numpy.array([base64.b64decode(each) if binary else each for each in data], numpy.object_)
    made = InferInput(name, list(array.shape), datatype, parameters=parameters)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


async def call(client: InferenceRESTClient, protocol: str, method: str, model: str = "", **given) -> object:
    if method.startswith("is_server"):
        return await getattr(client, method)(url)
    if method == "is_model_ready":
        return await client.is_model_ready(url, model)
    if protocol == "v1":
        return await getattr(client, method)(url, model_name=model, data=given["data"])
    sent = InferRequest(model, [tensor(**each) for each in given["inputs"]], parameters=given.get("parameters"))
    answer = await client.infer(url, sent, model_name=model)
    return {each.name: each.as_numpy().tolist() for each in answer.outputs}


async def grpc_call(client: InferenceGRPCClient, method: str, model: str = "", **given) -> object:
    if method.startswith("is_server"):
        return await getattr(client, method)()
    if method == "is_model_ready":
        return await client.is_model_ready(model)
    sent = InferRequest(model, [tensor(**each) for each in given["inputs"]], parameters=given.get("parameters"))
    return {each.name: each.as_numpy().tolist() for each in (await client.infer(sent)).outputs}


async def grpc_outcome(**given) -> object:
    async with InferenceGRPCClient(grpc_address) as client:
        try:
            return await grpc_call(client, **given)
        except grpc.RpcError as error:
            return {"status": error.code().name, "error": error.details()}


async def outcome(protocol: str, **given) -> object:
    if protocol == "grpc":
        return await grpc_outcome(**given)
    async with InferenceRESTClient(RESTConfig(protocol=protocol)) as client:
        for _ in range(5):
            try:
                return await call(client, protocol, **given)
            except httpx.HTTPStatusError as error:
                failure = {"status": error.response.status_code, "error": str(error)}
            if failure["status"] != 429:  # a busy machine exceeds the time of a batch of explanations
                break
    return failure


async def outcomes(calls: dict[str, dict]) -> dict[str, object]:
    return dict(zip(calls, await asyncio.gather(*(outcome(**each) for each in calls.values())), strict=True))


print(json.dumps(asyncio.run(outcomes(json.load(sys.stdin))), default=bytes.decode))  # gRPC has texts as bytes
