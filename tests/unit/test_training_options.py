"""The options of all train.py files: several processes, continuing, early stopping, logs."""

import argparse
import csv
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bundle.paths import ROOT
from models import command_line, evaluation, training
from tests.unit import tiny_training

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the small train.py in this process; return the folder of its weights."""

    def run(name: str, *options: str) -> Path:
        logs = tmp_path / f"{name.removesuffix('-continued')}-logs"
        folders = ["--out", str(tmp_path / name), "--log-dir", str(logs), "--accelerator", "cpu"]
        monkeypatch.setattr(sys, "argv", ["train.py", *folders, *options])
        tiny_training.main()
        return tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def run_module(module: str, *options: str) -> str:
    command = [sys.executable, "-m", module, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_two_processes_learn_the_same_weights_as_one(train: Train, tmp_path: Path):
    """The network has no batch normalisation and no noise, so only the order of the sums differs."""
    alone = train("alone")
    together = tmp_path / "together"
    several = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--threads", "1"]
    folders = ["--out", str(together), "--log-dir", str(tmp_path / "logs")]
    output = run_module("tests.unit.tiny_training", *several, *folders)
    torch.testing.assert_close(weights(together), weights(alone), rtol=0, atol=1e-3)
    assert output.count("Wrote weights.safetensors") == 1, "only the first process measures and saves"
    assert json.loads((together / "metrics.json").read_text())["processes"] == 2


def make_digits(folder: Path) -> None:
    """Write a data set in MNIST's format: each digit is a pattern of its own, under noise."""
    random = numpy.random.default_rng(0)
    patterns = random.integers(0, 160, (10, 4, 4)).repeat(7, 1).repeat(7, 2)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 1280), ("t10k", 400)):
        labels = random.integers(0, 10, count, dtype=numpy.uint8)
        pixels = (patterns[labels] + random.integers(0, 96, (count, 28, 28))).astype(numpy.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


@pytest.mark.slow
def test_two_processes_train_digits_as_accurately_as_one(tmp_path: Path):
    make_digits(tmp_path)
    accuracy = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        folders = ["--data-dir", str(tmp_path), "--out", str(out), "--log-dir", str(tmp_path / f"logs-{processes}")]
        options = ["--accelerator", "cpu", "--devices", str(processes), "--threads", "1", "--epochs", "6"]
        run_module("models.mnist.train", *folders, *options)
        accuracy[processes] = json.loads((out / "metrics.json").read_text())["accuracy"]
    assert accuracy[1] > 0.9
    assert accuracy[2] == pytest.approx(accuracy[1], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "stage"), [("0.1", "stage-1"), ("1.-1", "stage-1"), ("1.0", "stage-2")])
def test_stopped_run_that_is_continued_ends_with_the_weights_of_an_uninterrupted_one(
    train: Train, tmp_path: Path, stopped: str, stage: str
):
    whole = train("whole", "--noise")
    with pytest.raises(SystemExit):
        train("run", "--noise", f"--stop-in={stopped}")
    last = tmp_path / "run-logs" / "version_0" / stage / "checkpoints" / "last.ckpt"
    continued = train("run-continued", "--noise", "--resume", str(last))
    torch.testing.assert_close(weights(continued), weights(whole), rtol=0, atol=0)
    assert not torch.equal(weights(train("other", "--noise", "--seed", "1"))["0.bias"], weights(whole)["0.bias"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "stopped", "hint"),
    [
        (signal.SIGINT, 130, "0.-1", "No epoch was complete"),
        (signal.SIGTERM, 143, "0.0", "--resume {last}\n"),
        (signal.SIGINT, 130, "1.-1", "--resume {last}\n"),
    ],
)
def test_signal_ends_a_run_with_its_status_and_says_how_to_continue(
    tmp_path: Path, number: int, status: int, stopped: str, hint: str
):
    folders = ["--out", str(tmp_path / "out"), "--log-dir", str(tmp_path)]
    options = ["--accelerator", "cpu", f"--stop-in={stopped}", f"--signal={int(number)}"]
    command = ["env", "--default-signal=INT", sys.executable, "-m", "tests.unit.tiny_training", *folders, *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == status, run.stderr[-3000:]
    last = tmp_path / "version_0" / "stage-1" / "checkpoints" / "last.ckpt"
    assert "The run is stopped. " in run.stderr
    assert hint.format(last=last) in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_resume_with_another_recipe_names_what_differs(train: Train, tmp_path: Path):
    train("whole")
    last = tmp_path / "whole-logs" / "version_0" / "stage-1" / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match="a run with epochs 4, not 9$"):
        train("longer", "--epochs", "9", "--resume", str(last))
    with pytest.raises(SystemExit, match="a run with accumulate 1, not 2$"):
        train("accumulating", "--accumulate", "2", "--resume", str(last))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"text", "not a checkpoint"), ({"state_dict": {}}, "not a checkpoint")],
)
def test_resume_from_a_file_that_is_no_checkpoint_is_an_error(
    train: Train, tmp_path: Path, content: object, message: str
):
    file = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with pytest.raises(SystemExit, match=message):
        train("run", "--resume", str(file))


@pytest.mark.slow
def test_patience_stops_the_run_and_keeps_the_best_weights(train: Train, tmp_path: Path):
    out = train("run", "--worse", "--patience", "2", "--epochs", "20", "--noise")
    logs = tmp_path / "run-logs" / "version_0"
    losses = [float(row["val_loss"]) for row in logged(logs / "stage-2") if row["val_loss"]]
    assert losses == sorted(losses), "each epoch is worse, as the validation labels are wrong"
    assert len(losses) == 3
    best = torch.load(logs / "stage-2" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 0
    check_kept(out, best["state_dict"])
    patient = ["--worse", "--patience", "2", "--epochs", "20", "--noise"]
    with pytest.raises(SystemExit):
        train("stopped", *patient, "--stop-in", "1.1")
    last = tmp_path / "stopped-logs" / "version_0" / "stage-2" / "checkpoints" / "last.ckpt"
    check_kept(train("stopped-continued", *patient, "--resume", str(last)), best["state_dict"])


def check_kept(folder: Path, best: dict[str, torch.Tensor]) -> None:
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, best[f"model.{name}"].half(), rtol=0, atol=0)


@pytest.mark.slow
def test_run_logs_losses_and_learning_rates_to_csv_and_tensorboard(train: Train, tmp_path: Path):
    train("run")
    logs = tmp_path / "run-logs" / "version_0" / "stage-1"
    rows = logged(logs)
    assert sum(bool(row["loss_epoch"]) for row in rows) == sum(bool(row["val_accuracy"]) for row in rows) == 4
    rates = [float(row["lr-SGD/pg1"]) for row in rows if row["lr-SGD/pg1"]]
    assert max(rates) > rates[-1] >= 0
    board = EventAccumulator(str(logs))
    board.Reload()
    assert {"loss_epoch", "val_loss", "lr-SGD/pg1"} <= set(board.Tags()["scalars"])
    assert {file.name for file in (logs / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.slow
def test_accumulated_batches_make_fewer_steps_in_bfloat16(train: Train, tmp_path: Path):
    out = train("run", "--accumulate", "3", "--precision", "bf16-mixed")
    last = torch.load(tmp_path / "run-logs/version_0/stage-1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 4 * 4, "four epochs of twelve batches"
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["precision"], metrics["accumulate"]) == ("bf16-mixed", 3)
    assert metrics["accuracy"] > 0.5, "of three classes"


def parsed(monkeypatch: pytest.MonkeyPatch, *options: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    return command_line.arguments("Train.", tiny_training.RECIPE, ROOT / "models" / "mnist")


def test_batch_size_that_processes_cannot_share_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--devices", "3")
    assert "the batch size, 32, cannot be divided by 3 processes" in capsys.readouterr().err


def test_help_shows_the_options_and_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help")
    shown = capsys.readouterr().out
    for option in ("--devices", "--strategy", "--num-nodes", "--precision", "--accumulate", "--resume", "--patience"):
        assert option in shown
    assert "python -m models.mnist.train --devices 2 --precision bf16-mixed" in shown


def test_make_train_passes_its_arguments():
    command = ["make", "--dry-run", "train", "MODEL=mnist", "ARGS=--epochs 2 --help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "python -m models.mnist.train --epochs 2 --help\n" in run.stdout, run.stderr


def test_logs_are_written_to_the_build_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert parsed(monkeypatch).log_dir == ROOT / "build" / "train" / "mnist"


class Given(torch.nn.Module):
    """Return its input, as the logits."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@pytest.mark.parametrize("classes", [2, 4])
def test_area_under_the_curve_is_the_share_of_pairs_in_the_right_order(classes: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, classes, generator=generator)
    targets = torch.arange(60) % classes
    batches = training.Batches(logits, targets, batch_size=25, shuffle=False)
    figures = evaluation.evaluate(Given(), batches, classes)

    probabilities = logits.softmax(1)
    areas = []
    for label in range(classes):
        of_class, of_others = (probabilities[:, label][chosen] for chosen in (targets == label, targets != label))
        areas.append((of_class[:, None] > of_others).float().mean().item())
    name = "auroc" if classes == 2 else "macro_auroc"
    assert figures[name] == pytest.approx(numpy.mean(areas), abs=1e-4)
    assert figures["accuracy"] == pytest.approx((logits.argmax(1) == targets).float().mean().item(), abs=1e-5)


@pytest.mark.parametrize("model", ["audio", "avdigits", "cells", "image", "membrane", "mnist", "text"])
def test_every_training_module_has_a_main_and_a_recipe(model: str):
    module = importlib.import_module(f"models.{model}.train")
    assert callable(module.main)
    assert isinstance(module.RECIPE, training.Recipe)
