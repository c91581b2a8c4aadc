"""The accuracy in metrics.json once more, through the archives: files as people send them, decoded by the handlers.

Needs the data sets in DATA_DIR, and is skipped where they are not.
"""

import importlib
import io
import json
import os
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import select
from bundle.samples import first

DATA_DIR = Path(os.environ.get("DATA_DIR", "data"))
INPUTS = 1000
TOLERANCE = 0.025  # of an accuracy that is measured on so many inputs, and of files instead of tensors
SETS = {
    "mnist": "MNIST/raw/t10k-images-idx3-ubyte",
    "image": "cifar10-images.zip",
    "audio": "speech-commands-12.zip",
    "text": "clinc150/data_full.json",
}


def picture(pixels: torch.Tensor) -> bytes:
    """uint8 [C, H, W] -> a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(file, "PNG")
    return file.getvalue()


def sound(waveform: torch.Tensor) -> bytes:
    """float32 [samples] at 16 kHz -> a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), 16000, format="FLAC")
    return file.getvalue()


def held_out(model: str) -> tuple[list[bytes], list[str]]:
    """Files and labels, a random part of the test split."""
    train = importlib.import_module(f"models.{model}.train")
    if model == "text":
        texts, labels = zip(*train.load(DATA_DIR)["test"], strict=True)
        files = [text.encode() for text in texts]
    else:
        inputs, targets = train.load(DATA_DIR, "test")
        [folder] = select([model])
        labels = [folder.labels()[target] for target in targets.tolist()]
        files = Files(inputs, sound if model == "audio" else picture)
    chosen = numpy.random.default_rng(0).permutation(len(labels))[:INPUTS]
    return [files[index] for index in chosen], [labels[index] for index in chosen]


class Files:
    """Tensors, encoded when they are asked for."""

    def __init__(self, inputs: torch.Tensor, encode):
        self.inputs, self.encode = inputs, encode

    def __getitem__(self, index: int) -> bytes:
        return self.encode(self.inputs[int(index)])


@pytest.mark.parametrize("model", SETS)
def test_what_is_served_is_as_accurate_as_what_was_trained(model, tmp_path):
    if not (DATA_DIR / SETS[model]).exists():
        pytest.skip(f"there is no {SETS[model]} in DATA_DIR")
    contents, labels = held_out(model)
    [folder] = select([model])
    correct = 0
    with DryRun(archive(folder, store=tmp_path).path) as dry_run:
        for start in range(0, len(contents), 32):
            answers = dry_run.predict([{"body": content} for content in contents[start : start + 32]])
            for (status, body), label in zip(answers, labels[start : start + 32], strict=True):
                assert status == 200, body
                correct += first(body).label == label
    metrics = json.loads((folder.path / "metrics.json").read_text())
    trained = metrics["as_served"]["in_scope_accuracy"] if model == "text" else metrics["accuracy"]
    assert abs(correct / len(contents) - trained) < TOLERANCE
