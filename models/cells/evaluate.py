"""Measure the detector of blood cells as it is served: the handler decodes, detects and answers each test image."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import yaml
from torchmetrics.detection import MeanAveragePrecision

from handlers.core.boxes import Placement
from handlers.core.outputs import split_rows
from handlers.detection import DetectionHandler
from models import training
from models.cells.model import FOLDER, LABELS, CellNet
from models.cells.train import Target, load
from models.weights import load_weights

OPTIONS = DetectionHandler.Options(score_threshold=0.01, max_detections=100)  # all of them: mAP ranks them


@torch.inference_mode()
def predict(files: list[bytes], weights: Path) -> list[Target]:
    """Return the handler's answers with these weights, as the metric takes them."""
    config = yaml.safe_load((FOLDER / "model-config.yaml").read_text())
    handler = DetectionHandler()
    handler.settings = handler.Settings.model_validate(config["handler"])
    handler.labels, handler.mapping = LABELS, dict(enumerate(LABELS))
    model = load_weights(CellNet(), weights)
    predictions = []
    for content in files:
        sample = handler.decode(handler.Inputs(data=content))
        [row] = split_rows(handler.reduce(model(*handler.collate([sample]))))
        answer = handler.encode(row, cast("tuple[Placement, bytes]", sample.info), OPTIONS)
        found = cast("dict", answer)["detections"]
        predictions.append(
            {
                "boxes": torch.tensor([each["box"] for each in found]).reshape(-1, 4),
                "scores": torch.tensor([each["score"] for each in found]),
                "labels": torch.tensor([each["class"] for each in found], dtype=torch.int64),
            }
        )
    return predictions


def measure(data_dir: Path, weights: Path) -> dict:
    """Return the mean average precision of these weights on the test split, overall and per class."""
    examples = load(data_dir, "test")
    metric = MeanAveragePrecision(class_metrics=True, extended_summary=True, backend="faster_coco_eval")
    metric.update(predict([file for file, _ in examples], weights), [target for _, target in examples])
    result = metric.compute()
    # precision: [IoU thresholds, recall thresholds, classes, areas, maximum of detections]; of all areas, at most 100
    at_half = result["precision"][0, :, :, 0, -1].mean(dim=0).tolist()
    return {
        "map_50": round(result["map_50"].item(), 4),
        "map_50_95": round(result["map"].item(), 4),
        "map_50_per_class": {label: round(value, 4) for label, value in zip(LABELS, at_half, strict=True)},
        "map_50_95_per_class": {
            label: round(value, 4) for label, value in zip(LABELS, result["map_per_class"].tolist(), strict=True)
        },
        "test": len(examples),
    }


def save(options: argparse.Namespace, folder: Path, recipe: training.Recipe, seconds: float, examples: int) -> None:
    """Measure the weights in the folder of the run, write metrics.json there, and print the metrics."""
    figures = measure(options.data_dir, folder / "weights.safetensors")
    metrics = {
        "model": "cells",
        "data": {"name": "BCCD", "train": examples, "test": figures.pop("test")},
        **figures,
        "parameters": sum(p.numel() for p in CellNet().parameters()),
        "recipe": asdict(recipe),
        "warm_start": options.warm_start,
        "seed": options.seed,
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": training.COMMIT,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(metrics)
