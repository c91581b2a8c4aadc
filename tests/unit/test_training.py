"""Every train.py runs one epoch on random data in the real format, and writes a model that loads."""

import importlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from PIL import Image

from bundle.paths import ROOT
from models.weights import load_weights

RANDOM = numpy.random.default_rng(0)


def make_mnist(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 160), ("t10k", 40)):
        pixels = RANDOM.integers(0, 255, (count, 28, 28), dtype=numpy.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        )


def make_image(folder: Path) -> None:
    from models.image.train import LABELS

    with zipfile.ZipFile(folder / "cifar10-images.zip", "w") as files:
        for split, count in (("train", 280), ("test", 40)):
            for i in range(count):
                file = io.BytesIO()
                Image.fromarray(RANDOM.integers(0, 255, (32, 32, 3), dtype=numpy.uint8)).save(file, "JPEG")
                files.writestr(f"{split}/{LABELS[i % 10]}/{i:04}.jpg", file.getvalue())


def make_audio(folder: Path) -> None:
    from models.audio.train import LABELS

    with zipfile.ZipFile(folder / "speech-commands-12.zip", "w") as files:
        for i in range(144):
            file = io.BytesIO()
            soundfile.write(file, RANDOM.normal(0, 0.1, 16000), 16000, format="FLAC")
            label = LABELS[i % 12]
            name = {"_silence_": str(i), "_unknown_": f"bed_{i:08x}_nohash_0.wav"}.get(label, f"{i:08x}_nohash_0")
            files.writestr(f"{label}/{name}.flac", file.getvalue())


def make_text(folder: Path) -> None:
    words = ["".join(chr(97 + letter) for letter in RANDOM.integers(0, 26, 5)) for _ in range(400)]

    def rows(count: int, label: str | None = None) -> list[list[str]]:
        return [[" ".join(RANDOM.choice(words, 5)), label or f"intent_{i % 150}"] for i in range(count)]

    splits = {"train": rows(300), "val": rows(150), "test": rows(150)}
    splits |= {f"oos_{split}": rows(20, "oos") for split in ("train", "val", "test")}
    (folder / "clinc150").mkdir()
    (folder / "clinc150" / "data_full.json").write_text(json.dumps(splits))


NETWORKS = {"mnist": "DigitNet", "image": "ImageNet32", "audio": "KeywordNet", "text": "IntentNet"}


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS)
def test_training_writes_a_model_that_loads_and_its_metrics(model: str, tmp_path: Path):
    globals()[f"make_{model}"](tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", f"models.{model}.train", "--data-dir", str(tmp_path), "--out", str(out)]
    run = subprocess.run(
        [*command, "--epochs", "1", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=540
    )
    assert run.returncode == 0, run.stderr[-3000:]

    module = importlib.import_module(f"models.{model}.model")
    network = load_weights(getattr(module, NETWORKS[model])(), out / "weights.safetensors")
    labels = json.loads((out / "index_to_name.json").read_text())
    with torch.inference_mode():
        assert network(*module.example_inputs(2)).shape == (2, len(labels))
    metrics = json.loads((out / "metrics.json").read_text())
    tested = sum(map(sum, metrics["confusion_matrix"]))
    assert tested == metrics["data"]["test"]
    assert 0 <= metrics["accuracy"] <= 1
    assert len(metrics["accuracy_under"]) > 3
    first = metrics.get("stages", [metrics["recipe"]])[0]
    assert first["epochs"] == 1
    if model == "text":
        assert (out / "tokenizer.json").is_file()
