"""Workers of modules that a test makes: archived as a user's TorchScript files, for any handler."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder

DISTANCE = 8000  # weights of 4 bytes: less than the 32 KiB in which DEFLATE looks for repetitions


@torch.inference_mode()
def compressible(network: nn.Module) -> nn.Module:
    """Repeat the first random weights of each tensor: to compress others takes most of the time of a large archive."""
    for weight in network.parameters():
        first = weight.flatten()[:DISTANCE]
        weight.copy_(first.repeat(-(-weight.numel() // len(first)))[: weight.numel()].view_as(weight))
    return network


@contextmanager
def serving_with(
    handler: str, folder: Path, module: nn.Module, labels: list[str], batch: int = 4, **settings: object
) -> Iterator[DryRun]:
    """Make an archive of a module that a handler serves, and load it as a worker does."""
    path = folder / "models" / "things"
    path.mkdir(parents=True)
    torch.jit.script(module.eval()).save(str(path / "model.pt"))
    (path / "index_to_name.json").write_text(json.dumps(labels))
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": batch,
        "handler": settings,
        "bundle": {"handler": handler, "serialized": {"file": "model.pt"}},
    }
    (path / "model-config.yaml").write_text(yaml.safe_dump(config))
    with DryRun(archive(ModelFolder(path), folder / "store").path) as worker:
        yield worker
