"""Measure the detector of blood cells on the test images, decoded with Pillow and torchvision alone.

`tests/unit/test_detection.py` checks that the handler finds the same cells.
"""

import argparse
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_convert

from models import training
from models.cells.model import HEIGHT, LABELS, WIDTH, CellNet
from models.cells.train import Target, load
from models.weights import load_weights

MIN_SCORE, MAX_DETECTIONS = 0.01, 100  # of the metric, which ranks all detections
IOU_THRESHOLD = 0.5  # as served: above it, the worse of two boxes of a class is dropped


@torch.inference_mode()
def detect(model: CellNet, file: bytes) -> Target:
    """Detect the cells in a JPEG file with the aspect of the model's input.

    Returns:
        boxes float32 [K, 4] (x1, y1, x2, y2 in pixels of the image), scores [K], best first, and labels int64 [K].
    """
    image = Image.open(io.BytesIO(file)).convert("RGB")
    pixels = numpy.array(image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    [rows] = model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).transpose(1, 2)
    scores, labels = rows[:, 4:].max(dim=1)
    found = scores >= MIN_SCORE
    boxes, scores, labels = box_convert(rows[found, :4], "cxcywh", "xyxy"), scores[found], labels[found]
    best = batched_nms(boxes, scores, labels, IOU_THRESHOLD)[:MAX_DETECTIONS]
    corners = boxes[best].view(-1, 2, 2) * torch.tensor([image.width / WIDTH, image.height / HEIGHT])
    inside = corners.clamp_min(0).minimum(torch.tensor(image.size)).flatten(1)
    return {"boxes": inside, "scores": scores[best], "labels": labels[best]}


def measure(data_dir: Path, weights: Path) -> dict:
    """Return the mean average precision of these weights on the test split, overall and per class."""
    examples = load(data_dir, "test")
    metric = MeanAveragePrecision(class_metrics=True, extended_summary=True, backend="faster_coco_eval")
    model = load_weights(CellNet(), weights)
    metric.update([detect(model, file) for file, _ in examples], [target for _, target in examples])
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
    training.print_figures(metrics)
