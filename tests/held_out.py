"""Test data of the models, as clients send it."""

import importlib
import io
import itertools
import random
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


def requests(model: str, data_dir: Path, count: int) -> list[dict]:
    """Return rows of test data, as TorchServe passes requests on, for any model with weights; see `held_out`."""
    if model in OWN_ROWS:
        return OWN_ROWS[model](data_dir, count)
    files, _ = held_out(model, data_dir, count)
    return [{"body": file.decode() if model == "text" else file} for file in files]


def graphs(data_dir: Path, count: int) -> list[dict]:
    """Return molecules of the test split."""
    from models.molecule import train

    _, test = train.split(train.load(data_dir))
    chosen = [test[index] for index in numpy.random.default_rng(0).permutation(len(test))[:count].tolist()]
    found = [{"nodes": each.x.argmax(1).tolist(), "edges": each.edge_index.T.tolist()} for each in chosen]
    return [{"body": {"data": graph}} for graph in found]


def digits(data_dir: Path, count: int) -> list[dict]:
    """Return digits as pictures, words and sounds: each combination of them as often."""
    from models.avdigits import phrases, train

    clips = train.load_clips(data_dir)["test"].by_digit()
    files, labels = held_out("mnist", data_dir, count)
    generator = random.Random(0)
    subsets = itertools.cycle(each for size in (1, 2, 3) for each in itertools.combinations(train.INPUTS, size))
    rows = []
    for file, label, subset in zip(files, map(int, labels), subsets, strict=False):
        text = phrases.phrase(label, phrases.TEST, generator)
        row = {"image": file, "text": text, "audio": sound(generator.choice(clips[label]))}
        rows.append({name: row[name] for name in subset})
    return rows


def slices(data_dir: Path, count: int) -> list[dict]:
    """Return the test slices, each in up to eight orientations."""
    from models.membrane import train

    images, _ = train.load(data_dir)
    turned = [
        (torch.rot90(image, turns, (1, 2)).flip(2) if mirrored else torch.rot90(image, turns, (1, 2)))
        for mirrored in (False, True)
        for turns in range(4)
        for image in images[-train.TEST :]
    ]
    return [{"body": picture(image)} for image in turned[:count]]


def smears(data_dir: Path, count: int) -> list[dict]:
    """Return all test pictures of blood cells, which are fewer than `count`."""
    from models.cells import train

    return [{"body": file} for file, _ in train.load(data_dir, "test")[:count]]


OWN_ROWS: dict[str, Callable[[Path, int], list[dict]]] = {
    "molecule": graphs,
    "avdigits": digits,
    "membrane": slices,
    "cells": smears,
}


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
