"""A small handler and model in an archive, run by TorchServe's own worker code: fixture `worker`."""

import json
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bundle.build.dryrun import DryRun
from bundle.mar import MANIFEST

CLASSES, WIDTH, BATCH_SIZE, MAX_INSTANCES = 7, 4, 8, 20
SLOW_SECONDS = 0.4  # the handler takes this long to decode "slow"

HANDLER = textwrap.dedent(
    f"""
    import time
    import torch
    from handlers.core import inputs
    from handlers.core.batch import Sample
    from handlers.core.classifier import ClassifierHandler
    from handlers.core.declared import TakesTensors, TensorInput
    from handlers.core.errors import UndecodableInput
    from handlers.core.inputs import Text


    class NumbersHandler(ClassifierHandler, TakesTensors):
        class Inputs(inputs.Inputs):
            data: Text

        def tensor_inputs(self):
            return (TensorInput("numbers", "FP32", (4,)),)

        def decode(self, inputs):
            if inputs.data == "bug":
                raise ZeroDivisionError("a bug")
            if inputs.data == "slow":
                time.sleep({SLOW_SECONDS})
                return Sample(torch.zeros(4))
            try:
                return Sample(torch.tensor([float(number) for number in inputs.data.split(",")]).reshape(4))
            except (ValueError, RuntimeError) as exc:
                raise UndecodableInput("Four numbers are accepted.") from exc

        def example(self):
            return Sample(torch.zeros(4))
    """
)


class Numbers(nn.Module):
    """Map [N, 4] to logits [N, 7]. Fail on more than `BATCH_SIZE` inputs, and on the number 1e9."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.largest = BATCH_SIZE

    def forward(self, numbers: Tensor) -> Tensor:
        assert numbers.shape[0] <= self.largest
        assert not (numbers == 1e9).any()
        return self.layer(numbers)


def write_archive(folder: Path, **files: str) -> Path:
    """Write the archive into a folder, with further files by name, without their extension .json."""
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
        archive.writestr("model-config.yaml", f"handler: {{top_k: 3, max_instances: {MAX_INSTANCES}}}\n")
        for name, content in files.items():
            archive.writestr(f"{name}.json", content)
        archive.write(folder / "model.pt", "model.pt")
    return mar


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DryRun]:
    with DryRun(write_archive(tmp_path_factory.mktemp("archive")), BATCH_SIZE) as worker:
        yield worker


def row(index: int) -> dict:
    """Return a valid request, a different one for each index."""
    return {"body": f"{index},{index % 3},1,-{index}".encode()}


def approximately(answer: dict) -> dict:
    """Return an answer to compare with: probabilities may differ as float arithmetic does between batches."""
    return {
        "top_k": [{**entry, "probability": pytest.approx(entry["probability"], abs=1e-5)} for entry in answer["top_k"]]
    }
