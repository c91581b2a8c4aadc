"""Make calls with KServe's own client: a JSON object of calls on stdin, that of their results on stdout.

This program runs in the environment of requirements/kserve.txt, which has nothing of the bundle. All calls are made at
the same time.

    python kserve_calls.py URL <<< '{"a name": {"protocol": "v2", "method": "is_model_ready", "model": "mnist"}}'
"""

import asyncio
import base64
import json
import sys

import httpx
import numpy
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

url = sys.argv[1]


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


async def outcome(protocol: str, **given) -> object:
    async with InferenceRESTClient(RESTConfig(protocol=protocol)) as client:
        try:
            return await call(client, protocol, **given)
        except httpx.HTTPStatusError as error:
            return {"status": error.response.status_code, "error": str(error)}


async def outcomes(calls: dict[str, dict]) -> dict[str, object]:
    return dict(zip(calls, await asyncio.gather(*(outcome(**each) for each in calls.values())), strict=True))


print(json.dumps(asyncio.run(outcomes(json.load(sys.stdin)))))
