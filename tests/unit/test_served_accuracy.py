"""The accuracy in metrics.json, measured again through the archives: the handlers decode files as clients send them.

A test is skipped if its data set is not in DATA_DIR.
"""

import importlib
import io
import json
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
from tests.shipped import DATA_DIR, SHIPPED, skip_without_data_set

INPUTS = 1000
TOLERANCE = 0.025  # of an accuracy on INPUTS inputs, which are files instead of tensors


def picture(pixels: torch.Tensor) -> bytes:
    """Encode uint8 [C, H, W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(file, "PNG")
    return file.getvalue()


def sound(waveform: torch.Tensor) -> bytes:
    """Encode float32 [samples] at 16 kHz as a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), 16000, format="FLAC")
    return file.getvalue()


def held_out(model: str) -> tuple[list[bytes], list[str]]:
    """Return files and their labels: a random part of the test split."""
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
    """A list of files, each encoded when it is read."""

    def __init__(self, inputs: torch.Tensor, encode):
        self.inputs, self.encode = inputs, encode

    def __getitem__(self, index: int) -> bytes:
        return self.encode(self.inputs[int(index)])


@pytest.mark.slow
@pytest.mark.parametrize("model", SHIPPED)
def test_served_accuracy_is_close_to_the_recorded_one(model: str, tmp_path: Path):
    skip_without_data_set(model)
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
