"""Run an archive's handler in this process, with TorchServe's own worker code but without a server.

with DryRun(Path("model_store/image.mar")) as dry_run:
    [(status, body)] = dry_run.predict([{"body": photo}])
"""

import io
import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
from ts.service import Service
from ts.torch_handler.base_handler import BaseHandler

from bundle import mar
from bundle.build.imports import imports_from
from bundle.paths import ROOT
from handlers.core import tracing
from handlers.core.slots import Sample

METRICS_CONFIG = ROOT / "bundle" / "config" / "metrics.yaml"


class DryRun:
    """A model that is loaded as a worker loads it.

    `ts.model_loader` imports the handler from the unpacked archive, and `ts.service` calls it with a real metrics
    cache.

    Args:
        archive: a .mar file.
        batch_size: the largest batch; by default, that of the archive's model-config.yaml.
        gpu: the index of the worker's GPU; by default, the worker has none.
        settings: of the handler, in the place of those in the archive's model-config.yaml.

    Attributes:
        handler: the handler's instance.

    Raises:
        Exception: the handler's `initialize` raised it.
    """

    def __init__(
        self,
        archive: Path,
        batch_size: int | None = None,
        gpu: int | None = None,
        settings: Mapping[str, object] | None = None,
    ):
        self.unpacked = tempfile.TemporaryDirectory(prefix=f"dryrun-{archive.stem}-")
        try:
            self.service = self.load(archive, Path(self.unpacked.name), batch_size, gpu, settings or {})
        except BaseException:
            self.close()
            raise
        self.service.set_cl_socket(None)
        self.handler: BaseHandler = self.service._entry_point.__self__

    @staticmethod
    def load(
        archive: Path, folder: Path, batch_size: int | None, gpu: int | None, settings: Mapping[str, object]
    ) -> Service:
        """Unpack the archive into the folder, and load the model."""
        mar.unpack(archive, folder)
        model, config = mar.manifest(archive), mar.config(archive)
        if settings:
            config["handler"] = {**(config.get("handler") or {}), **settings}
            (folder / model["configFile"]).write_text(yaml.safe_dump(config))
        metrics = MetricsCacheYamlImpl(config_file_path=str(METRICS_CONFIG))
        metrics.initialize_cache()
        metrics.model_name = model["modelName"]
        with imports_from(folder.iterdir()), tracing.disabled():  # it is no server whose traces anybody looks for
            return ModelLoaderFactory.get_model_loader().load(
                model_name=model["modelName"],
                model_dir=str(folder),
                handler=model["handler"],
                gpu_id=gpu,
                batch_size=batch_size or config.get("batchSize", 1),
                metrics_cache=metrics,
            )

    def predict(self, rows: list[dict], headers: list[dict[str, str]] | None = None) -> list[tuple[int, object]]:
        """Send one batch of requests.

        Args:
            rows: the requests as TorchServe passes them on: {"body": value}, or {field: value, ...}.
            headers: the HTTP headers of each request; by default, none.

        Returns:
            status and body of each answer. A body is parsed if its content type is JSON, bytes if it is a picture or
            has binary tensors, and otherwise a str. If the batch fails as a whole, each body is TorchServe's message.
        """
        headers = headers or [{} for _ in rows]
        batch = [request(index, *pair) for index, pair in enumerate(zip(rows, headers, strict=True))]
        return answers(self.service.predict(batch), len(rows))

    def decode(self, row: dict, headers: dict[str, str] | None = None) -> list[Sample]:
        """Decode one request with the archive's handler, a `BatchHandler`, and return its samples.

        Raises:
            RequestError: the request is invalid.
        """
        return [self.handler.decode(each) for each in self.handler.read(row, headers or {}).inputs]

    def close(self) -> None:
        """Delete the unpacked archive."""
        self.unpacked.cleanup()

    def __enter__(self) -> "DryRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request(index: int, row: dict, headers: dict[str, str]) -> dict:
    """Return a request in the form that `ts.protocol.otf_message_handler` decodes from the worker's socket."""
    parameters = [
        {"name": name, "contentType": "", "value": bytearray(value) if isinstance(value, bytes) else value}
        for name, value in row.items()
    ]
    pairs = [{"name": name.encode(), "value": value.encode()} for name, value in headers.items()]
    return {"requestId": str(index).encode(), "parameters": parameters, "headers": pairs}


def answers(response: bytes, count: int) -> list[tuple[int, object]]:
    """Decode the bytes that `ts.protocol.otf_message_handler.create_predict_response` writes for the frontend.

    Args:
        count: the number of requests in the batch.
    """
    stream = io.BytesIO(response)

    def number() -> int:
        return struct.unpack("!i", stream.read(4))[0]

    def content() -> bytes:
        return stream.read(number())

    def text() -> str:
        return content().decode()

    code, message = number(), text()
    if code != 200:
        return [(code, message)] * count
    decoded: list[tuple[int, object]] = []
    for _ in range(count):
        text()  # the request's id
        content_type, status, _phrase = text(), number(), text()
        for _ in range(number()):
            text(), text()  # a response header
        body = content()
        if content_type == "application/json":
            decoded.append((status, json.loads(body)))
        else:
            binary = content_type.startswith("image/") or content_type == "application/octet-stream"
            decoded.append((status, body if binary else body.decode()))
    return decoded
