"""Train the classifier of molecules on NCI1: active against lung cancer cells or not (Wale et al. 2008).

This reads `graphs/NCI1/raw` in the data directory. If it is missing, PyTorch Geometric downloads it there.

    make train MODEL=molecule
    python -m models.molecule.train --data-dir data --epochs 80
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch_geometric.data import Dataset
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from models import training
from models.molecule.model import CLASSES, FOLDER, RADIUS, MoleculeNet, Subtrees
from models.weights import round_weights


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """The hyper-parameters of the graph network, and those of the subtrees."""

    radius: int = RADIUS  # of the largest subtrees, in bonds
    ridge: float = 0.1  # of ridge regression


RECIPE = Recipe(
    epochs=80, batch_size=64, learning_rate=5e-3, weight_decay=0.02, warmup=0.1, averaging=0.99, optimizer="adamw"
)
LABELS = ["inactive", "active"]
HELD_OUT = 0.1  # of all graphs, for the test
FOLDS = 3  # of the cross-validation


class Graphs:
    """Batches of graphs, as tensors: node types, edges, the numbers of nodes (see `MoleculeNet`), and targets."""

    def __init__(self, graphs: Dataset, batch_size: int, shuffle: bool):
        self.loader = DataLoader(graphs, batch_size, shuffle=shuffle, drop_last=shuffle)

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


def split(dataset: TUDataset) -> tuple[Dataset, Dataset]:
    """Return the graphs to train on, and the test graphs. The split does not depend on the seed of a run."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    held_out = round(HELD_OUT * len(dataset))
    return dataset[order[held_out:]], dataset[order[:held_out]]


@torch.no_grad()
def tabulate(subtrees: Subtrees, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of all graphs as a matrix.

    Returns:
        the distinct features, int64 [F], ascending; the matrix, sparse float32 [N, F], whose rows all have the same
        length; the targets, float32 [N], -1 or 1.
    """
    entries, sizes, targets, before = [], [], [], 0
    for nodes, edges, counts, labels in graphs:
        features, rows = subtrees.features(nodes, edges, counts)
        entries.append(torch.stack([rows + before, features]))
        sizes.append(counts)
        targets.append(labels)
        before += len(counts)
    rows, features = torch.cat(entries, dim=1)
    keys, columns = features.unique(return_inverse=True)
    values = torch.cat(sizes).rsqrt()[rows]
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (before, len(keys))).coalesce()
    return keys, matrix, torch.cat(targets).float() * 2 - 1


def solve(kernel: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the coefficients of kernel ridge regression, float32 [N], and the intercept."""
    intercept = targets.mean()
    return torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), targets - intercept), intercept


def cross_validate(kernel: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the scores of all graphs, float32 [N], each from the other folds, and their accuracy."""
    scores, order = torch.empty(len(targets)), torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    for held_out in order.chunk(FOLDS):
        rest = torch.ones(len(targets), dtype=torch.bool).index_fill(0, held_out, False)
        coefficients, intercept = solve(kernel[rest][:, rest], targets[rest], ridge)
        scores[held_out] = kernel[held_out][:, rest] @ coefficients + intercept
    return scores, round(((scores > 0) == (targets > 0)).float().mean().item(), 5)


def sharpness(scores: Tensor, targets: Tensor) -> float:
    """Return the factor that makes logits of scores, with the smallest cross-entropy (Platt 1999)."""
    factors = torch.arange(0.5, 20, 0.05)
    losses = nn.functional.softplus(-targets * scores * factors[:, None]).mean(dim=1)
    return factors[losses.argmin()].item()


def fit_subtrees(subtrees: Subtrees, graphs: Graphs, ridge: float) -> dict:
    """Fit the weights of subtrees by ridge regression, in its kernel's form: there are more features than graphs.

    Returns:
        the number of features, and the accuracy in cross-validation.
    """
    keys, matrix, targets = tabulate(subtrees, graphs)
    kernel = torch.sparse.mm(matrix, matrix.t()).to_dense() / (subtrees.radius + 1)
    scores, accuracy = cross_validate(kernel, targets, ridge)
    coefficients, intercept = solve(kernel, targets, ridge)
    factor = sharpness(scores, targets)
    weights = (matrix.t() @ coefficients[:, None])[:, 0] / (subtrees.radius + 1)
    subtrees.keys[: len(keys)] = keys
    subtrees.weights[: len(keys)] = weights * factor
    subtrees.bias.copy_(intercept * factor)
    return {"features": len(keys), "cross_validated_accuracy": accuracy, "folds": FOLDS, "factor": round(factor, 2)}


@torch.inference_mode()
def rank(model: nn.Module, graphs: Graphs) -> dict[str, float]:
    """Return how well the probability of "active" ranks the graphs, at all thresholds."""
    metrics = MetricCollection({"auroc": BinaryAUROC(), "average_precision": BinaryAveragePrecision()})
    for *inputs, targets in graphs:
        metrics.update(model(*inputs).softmax(dim=1)[:, 1], targets)
    return {name: round(value.item(), 5) for name, value in metrics.compute().items()}


def main() -> None:
    options = training.arguments(__doc__, RECIPE)
    recipe = replace(RECIPE, epochs=options.epochs)
    known, test = split(load(options.data_dir))

    model = MoleculeNet()
    subtrees = fit_subtrees(model.subtrees, Graphs(known, 256, shuffle=False), recipe.ridge)
    classifier = training.Classifier(model.network, recipe)
    seconds = training.fit(classifier, Graphs(known, recipe.batch_size, shuffle=True))

    model = round_weights(model.cpu()).eval()
    measured = Graphs(test, 256, shuffle=False)
    report = {
        "model": "molecule",
        "data": {"name": "NCI1", "train": len(known), "test": len(test)},
        "subtrees": subtrees,
        "accuracy_of_parts": {
            name: training.evaluate(part, measured, CLASSES)["accuracy"] for name, part in model.named_children()
        },
        **rank(model, measured),
        **training.evaluate(model, measured, CLASSES),
    }
    training.save(options, FOLDER, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
