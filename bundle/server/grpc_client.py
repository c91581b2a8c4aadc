"""Predictions over gRPC, as `POST /predictions/<model>` over HTTP."""

import functools
import sys
from types import ModuleType

import grpc

from bundle.paths import ROOT

_OPTIONS = [
    # a gRPC client's own limit is 4 MiB; the server's is in config.properties
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


class GrpcError(Exception):
    """A call failed, in the server or on the way to it."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str):
        # The first line is the message; TorchServe appends a Java class name.
        super().__init__(f"{address}: {code.name}: {details.splitlines()[0] if details else code.value[1]}")
        self.code = code
        self.details = details


def predict(
    address: str,
    model: str,
    data: bytes | dict[str, bytes],
    version: str | None = None,
    timeout: float = 30.0,
    authorization: str | None = None,
) -> bytes:
    """Return a model's answer to one request.

    If the handler rejects the request with a 4xx, its error body is returned like an answer, because TorchServe drops
    the status of a request over gRPC.

    Args:
        data: the field "data", or all fields by name; over HTTP they would be the fields of a form.
        version: by default, the default version.
        timeout: in seconds; required, because a call to a worker that never answers would not end.
        authorization: the header of that name, for a server that requires tokens.

    Raises:
        GrpcError: the call failed.
    """
    messages, _ = _stubs()
    fields = data if isinstance(data, dict) else {"data": data}
    request = messages.PredictionsRequest(model_name=model, model_version=version or "", input=fields)
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
    """Compile the proto file in memory at the first call, so that no generated code can differ from it."""
    if str(ROOT) not in sys.path:  # where grpcio-tools looks for the file; the command `bundle` runs in any folder
        sys.path.append(str(ROOT))
    return grpc.protos_and_services("bundle/proto/inference.proto")
