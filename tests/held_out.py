"""Files of the shipped models' test data, as clients send them."""

import importlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import soundfile
import torch
from PIL import Image

from bundle.catalog import select


def held_out(model: str, data_dir: Path, count: int) -> tuple[list[bytes], list[str]]:
    """Return files and their labels: a random part of the test split, the same in each call."""
    train = importlib.import_module(f"models.{model}.train")
    files: Sequence[bytes] | Files
    if model == "text":
        texts, labels = zip(*train.load(data_dir)["test"], strict=True)
        files = [text.encode() for text in texts]
    else:
        inputs, targets = train.load(data_dir, "test")
        [folder] = select([model])
        labels = [folder.labels()[target] for target in targets.tolist()]
        files = Files(inputs, sound if model == "audio" else picture)
    chosen = numpy.random.default_rng(0).permutation(len(labels))[:count]
    return [files[index] for index in chosen], [labels[index] for index in chosen]


class Files:
    """A list of files, each encoded when it is read."""

    def __init__(self, inputs: torch.Tensor, encode: Callable[[torch.Tensor], bytes]):
        self.inputs, self.encode = inputs, encode

    def __getitem__(self, index: int) -> bytes:
        return self.encode(self.inputs[int(index)])


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
