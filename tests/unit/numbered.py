"""A small handler and a scripted model in an archive made here, in TorchServe's own worker code: fixture `worker`."""

import json
import textwrap
import zipfile
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bundle.build.dryrun import DryRun
from bundle.mar import MANIFEST

CLASSES, WIDTH, BATCH_SIZE, MAX_INSTANCES = 7, 4, 8, 20

HANDLER = textwrap.dedent(
    """
    import time
    import torch
    from handlers.core.batch import BatchHandler
    from handlers.core.errors import UndecodableInput


    class NumbersHandler(BatchHandler):
        def decode(self, content):
            if content == b"bug":
                raise ZeroDivisionError("a bug")
            if content == b"slow":
                time.sleep(2.1)
                return torch.zeros(4)
            try:
                return torch.tensor([float(number) for number in content.split(b",")]).reshape(4)
            except (ValueError, RuntimeError, TypeError) as exc:
                raise UndecodableInput("Four numbers are accepted.") from exc

        def example(self):
            return torch.zeros(4)
    """
)


class Numbers(nn.Module):
    """[N, 4] -> [N, 7] logits. It refuses batches that are larger than the worker was told."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.largest = BATCH_SIZE

    def forward(self, numbers: Tensor) -> Tensor:
        assert numbers.shape[0] <= self.largest
        return self.layer(numbers)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    folder = tmp_path_factory.mktemp("archive")
    torch.manual_seed(0)
    torch.jit.script(Numbers().eval()).save(str(folder / "model.pt"))
    manifest = {
        "model": {
            "modelName": "numbers",
            "modelVersion": "1.0",
            "handler": "numbers_handler.py",
            "serializedFile": "model.pt",
            "configFile": "model-config.yaml",
        }
    }
    mar = folder / "numbers.mar"
    with zipfile.ZipFile(mar, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(manifest))
        archive.writestr("numbers_handler.py", HANDLER)
        archive.writestr("index_to_name.json", json.dumps({str(index): f"n{index}" for index in range(CLASSES)}))
        archive.writestr(
            "model-config.yaml", f"handler: {{top_k: 3, max_instances: {MAX_INSTANCES}, max_decode_seconds: 2}}\n"
        )
        archive.write(folder / "model.pt", "model.pt")
    with DryRun(mar, BATCH_SIZE) as worker:
        yield worker


def row(index: int) -> dict:
    """A good request, another for each index."""
    return {"body": f"{index},{index % 3},1,-{index}".encode()}


def alike(answer: dict) -> dict:
    """What an answer is compared with: the same to what float batching allows."""
    return {
        "top_k": [{**entry, "probability": pytest.approx(entry["probability"], abs=1e-5)} for entry in answer["top_k"]]
    }
