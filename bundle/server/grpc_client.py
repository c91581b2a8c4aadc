"""Predictions over gRPC: what `POST /predictions/<model>` is over HTTP."""

import functools
import sys
from types import ModuleType

import grpc

from bundle.paths import ROOT

_OPTIONS = [
    # a gRPC client refuses answers over 4 MiB; the server has its own limit, in config.properties
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class GrpcError(Exception):
    """The server, or the way to it, answered something else than OK."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str):
        # The first line is the message; TorchServe appends a Java class name.
        super().__init__(f"{address}: {code.name}: {details.splitlines()[0] if details else code.value[1]}")
        self.code = code
        self.details = details


def predict(
    address: str,
    model: str,
    data: bytes,
    version: str | None = None,
    timeout: float = 30.0,
    authorization: str | None = None,
) -> bytes:
    """The answer of `model` (its default version, unless one is named) to one request.

    A request that the handler refuses with a 4xx comes back here like any answer: TorchServe drops the status
    that a handler sets per request when it answers over gRPC, so the error body is all there is of it.

    `timeout` is in seconds and always ends the call: a worker that never answers would hold it for ever.
    `authorization` is the header of that name, for a server that asks for keys."""
    messages, _ = _stubs()
    # The handler's row has the key "data", as a multipart field of that name has over HTTP.
    request = messages.PredictionsRequest(model_name=model, model_version=version or "", input={"data": data})
    metadata = [("authorization", authorization)] if authorization else []
    return _call(address, "Predictions", request, timeout, metadata).prediction


def _call(address: str, method: str, request, timeout: float, metadata: list[tuple[str, str]]):
    _, services = _stubs()
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            call = getattr(services.InferenceAPIsServiceStub(channel), method)
            return call(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as exc:
            raise GrpcError(address, exc.code(), exc.details() or "") from exc


@functools.cache
def _stubs() -> tuple[ModuleType, ModuleType]:
    """Compiled in memory at the first call (grpcio-tools): no generated code to keep in step with the proto."""
    if str(ROOT) not in sys.path:  # where grpcio-tools looks for the file; the command `bundle` runs in any folder
        sys.path.append(str(ROOT))
    return grpc.protos_and_services("bundle/proto/inference.proto")
