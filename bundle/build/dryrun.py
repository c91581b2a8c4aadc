"""An archive's handler, run in this process by TorchServe's own worker code: a worker without a server.

with DryRun(Path("model_store/image.mar")) as dry_run:
    [(status, body)] = dry_run.predict([{"body": photo}])
"""

import io
import json
import struct
import tempfile
from pathlib import Path

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
from ts.service import Service
from ts.torch_handler.base_handler import BaseHandler

from bundle import mar
from bundle.build.imports import imports_from
from bundle.paths import ROOT
from handlers.core.slots import Sample

METRICS_CONFIG = ROOT / "bundle" / "config" / "metrics.yaml"


class DryRun:
    """Loads an archive as a worker does: `ts.model_loader` imports the handler out of the unpacked archive,
    `ts.service` calls it, a real metrics cache counts.

    Args:
        archive: a .mar file.
        batch_size: what the frontend would tell the worker; by default, as the archive's model-config.yaml says.
        gpu: the number of the GPU that the frontend would give the worker; by default, none.

    Attributes:
        handler: the handler's instance.

    Raises:
        Exception: whatever the handler's `initialize` raises.
    """

    def __init__(self, archive: Path, batch_size: int | None = None, gpu: int | None = None):
        self.unpacked = tempfile.TemporaryDirectory(prefix=f"dryrun-{archive.stem}-")
        try:
            self.service = self.load(archive, Path(self.unpacked.name), batch_size, gpu)
        except BaseException:
            self.close()
            raise
        self.service.set_cl_socket(None)
        self.handler: BaseHandler = self.service._entry_point.__self__

    @staticmethod
    def load(archive: Path, folder: Path, batch_size: int | None, gpu: int | None) -> Service:
        mar.unpack(archive, folder)
        model, config = mar.manifest(archive), mar.config(archive)
        metrics = MetricsCacheYamlImpl(config_file_path=str(METRICS_CONFIG))
        metrics.initialize_cache()
        metrics.model_name = model["modelName"]
        with imports_from(folder.iterdir()):
            return ModelLoaderFactory.get_model_loader().load(
                model_name=model["modelName"],
                model_dir=str(folder),
                handler=model["handler"],
                gpu_id=gpu,
                batch_size=batch_size or config.get("batchSize", 1),
                metrics_cache=metrics,
            )

    def predict(self, rows: list[dict], headers: list[dict[str, str]] | None = None) -> list[tuple[int, object]]:
        """One batch.

        Args:
            rows: a request each, as TorchServe hands it over: {"body": value}, or {field: value, ...}.
            headers: the HTTP headers of each request; by default, none.

        Returns:
            status and body of each answer. The body is parsed where its content type says JSON, else it is a str.
            A batch that fails as a whole has TorchServe's message as each body.
        """
        headers = headers or [{} for _ in rows]
        batch = [request(index, *pair) for index, pair in enumerate(zip(rows, headers, strict=True))]
        return answers(self.service.predict(batch), len(rows))

    def decode(self, row: dict, headers: dict[str, str] | None = None) -> list[Sample]:
        """Decode one request with the archive's handler, a `BatchHandler`, and return its samples.

        Raises:
            RequestError: it is rejected.
        """
        return [self.handler.decode(each) for each in self.handler.read(row, headers or {}).inputs]

    def close(self) -> None:
        self.unpacked.cleanup()

    def __enter__(self) -> "DryRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request(index: int, row: dict, headers: dict[str, str]) -> dict:
    """A request as `ts.protocol.otf_message_handler` decodes it off the worker's socket."""
    parameters = [
        {"name": name, "contentType": "", "value": bytearray(value) if isinstance(value, bytes) else value}
        for name, value in row.items()
    ]
    pairs = [{"name": name.encode(), "value": value.encode()} for name, value in headers.items()]
    return {"requestId": str(index).encode(), "parameters": parameters, "headers": pairs}


def answers(response: bytes, count: int) -> list[tuple[int, object]]:
    """Decodes what `ts.protocol.otf_message_handler.create_predict_response` encodes for the frontend."""
    stream = io.BytesIO(response)

    def number() -> int:
        return struct.unpack("!i", stream.read(4))[0]

    def text() -> str:
        return stream.read(number()).decode()

    code, message = number(), text()
    if code != 200:
        return [(code, message)] * count
    decoded = []
    for _ in range(count):
        text()  # the request's id
        content_type, status, _phrase = text(), number(), text()
        for _ in range(number()):
            text(), text()  # a response header
        body = text()
        decoded.append((status, json.loads(body) if content_type == "application/json" else body))
    return decoded
