"""Train the classifier of molecules on NCI1: active against lung cancer cells or not (Wale et al. 2008).

This reads `graphs/NCI1/raw` in the data directory. If it is missing, PyTorch Geometric downloads it there.

    make train MODEL=molecule
    python -m models.molecule.train --data-dir data --epochs 200
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler
from torch_geometric.data import Dataset
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader

from models import command_line, evaluation, training
from models.molecule.model import CLASSES, FOLDER, MoleculeNet
from models.weights import round_weights

RECIPE = training.Recipe(
    epochs=200, batch_size=64, learning_rate=5e-3, weight_decay=0.02, warmup=0.1, averaging=0.99, optimizer="adamw"
)
LABELS = ["inactive", "active"]
HELD_OUT = 0.1  # of all graphs, for the test, and as much again for the validation


class SharedSampler(BatchSampler):
    """Give each process that trains its part of every batch."""

    def __iter__(self) -> Iterator[list[int]]:
        return training.shared(super().__iter__())


class Graphs:
    """Batches of graphs, as tensors: node types, edges, the numbers of nodes (see `MoleculeNet`), and targets."""

    def __init__(self, graphs: Dataset, batch_size: int, shuffle: bool):
        if shuffle:
            self.loader = DataLoader(
                graphs, batch_sampler=SharedSampler(RandomSampler(graphs), batch_size, drop_last=True)
            )
        else:  # with a generator of its own, because a loader takes a random number even if it does not shuffle
            self.loader = DataLoader(graphs, batch_size, generator=torch.Generator())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.loader:
            yield batch.x.argmax(dim=1), batch.edge_index, batch.ptr.diff(), batch.y


def load(data_dir: Path) -> TUDataset:
    """Load NCI1: one-hot node types, and each edge in both directions."""
    raw = data_dir / "graphs" / "NCI1" / "raw"
    if not raw.is_dir():
        return TUDataset(data_dir / "graphs", "NCI1")
    with TemporaryDirectory() as root:  # PyTorch Geometric writes beside the raw files, which may be read-only
        shutil.copytree(raw, Path(root) / "NCI1" / "raw")
        return TUDataset(root, "NCI1")


def split(dataset: TUDataset) -> tuple[Dataset, Dataset, Dataset]:
    """Return the training, validation and test graphs. The split does not depend on the seed of a run."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    held_out = round(HELD_OUT * len(dataset))
    return dataset[order[2 * held_out :]], dataset[order[held_out : 2 * held_out]], dataset[order[:held_out]]


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER)
    recipe = replace(RECIPE, epochs=options.epochs)
    train, validation, test = split(load(options.data_dir))

    classifier = training.Classifier(MoleculeNet(), recipe)
    measured = {name: Graphs(part, 256, shuffle=False) for name, part in (("validation", validation), ("test", test))}
    batches = Graphs(train, recipe.batch_size, shuffle=True)
    seconds = training.fit(options, training.Stage(classifier, batches, measured["validation"]))

    model = round_weights(classifier.model.cpu()).eval()
    report = {
        "model": "molecule",
        "data": {"name": "NCI1", "train": len(train), "validation": len(validation), "test": len(test)},
        "validation_accuracy": evaluation.evaluate(model, measured["validation"], CLASSES)["accuracy"],
        **evaluation.evaluate(model, measured["test"], CLASSES),
    }
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
