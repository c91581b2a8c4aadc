"""Fit the classifier of molecules to NCI1: active against lung cancer cells or not (Wale et al. 2008).

This reads `graphs/NCI1/raw` in the data directory. If it is missing, PyTorch Geometric downloads it there. It takes
seconds. The radius of the subtrees and the ridge were chosen by cross-validation on the graphs that are not tested on.

    make train MODEL=molecule
    python -m models.molecule.train --data-dir data
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch_geometric.data import Dataset
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader

from models import command_line, data_sets, evaluation, training
from models.molecule.model import FOLDER, LABELS, SUBTREES, MoleculeNet
from models.weights import round_weights

RIDGE = 0.1  # of ridge regression
HELD_OUT = 0.1  # of all graphs, for the test
FOLDS = 3  # of the cross-validation


class Graphs:
    """Batches of graphs, as tensors: node types, edges, the numbers of nodes (see `MoleculeNet`), and targets."""

    def __init__(self, graphs: Dataset, batch_size: int = 256):
        self.loader = DataLoader(graphs, batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.loader:
            yield batch.x.argmax(dim=1), batch.edge_index, batch.ptr.diff(), batch.y


def load(data_dir: Path) -> TUDataset:
    """Load NCI1: one-hot node types, and each edge in both directions.

    Raises:
        SystemExit: the data set is missing, and cannot be downloaded.
    """
    raw = data_dir / "graphs" / "NCI1" / "raw"
    with data_sets.downloaded("NCI1", data_dir / "graphs"):
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
def tabulate(model: MoleculeNet, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of all graphs as a matrix.

    Returns:
        the distinct features, int64 [F], ascending; the matrix, sparse float32 [N, F], whose rows all have the same
        length; the targets, float32 [N], -1 or 1.
    """
    entries, sizes, targets, before = [], [], [], 0
    for nodes, edges, counts, labels in graphs:
        features, rows = model.features(nodes, edges, counts)
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


def fit(model: MoleculeNet, graphs: Graphs, ridge: float) -> dict:
    """Fit the weights of subtrees by ridge regression, in its kernel's form: there are more features than graphs.

    Returns:
        the number of parameters, the accuracy in cross-validation, and the factor of `sharpness`.
    """
    keys, matrix, targets = tabulate(model, graphs)
    if len(keys) > SUBTREES:
        raise SystemExit(f"The graphs have {len(keys)} features. Set SUBTREES in model.py to at least this number.")
    kernel = torch.sparse.mm(matrix, matrix.t()).to_dense() / (model.radius + 1)
    scores, accuracy = cross_validate(kernel, targets, ridge)
    coefficients, intercept = solve(kernel, targets, ridge)
    factor = sharpness(scores, targets)
    weights = (matrix.t() @ coefficients[:, None])[:, 0] / (model.radius + 1)
    model.keys[: len(keys)] = keys
    model.weights[: len(keys)] = weights * factor
    model.bias.copy_(intercept * factor)
    return {
        "parameters": len(keys) + 1,
        "cross_validated_accuracy": accuracy,
        "folds": FOLDS,
        "sharpness": round(factor, 2),
    }


def main() -> None:
    options = command_line.basic_parser(__doc__, FOLDER).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    known, test = split(load(options.data_dir))
    model, start = MoleculeNet().eval(), time.monotonic()
    fitted = fit(model, Graphs(known), RIDGE)
    seconds = time.monotonic() - start
    metrics = {
        "model": "molecule",
        "data": {"name": "NCI1", "train": len(known), "test": len(test)},
        **evaluation.evaluate(round_weights(model), Graphs(test), len(LABELS)),
        **fitted,
        "recipe": {"radius": model.radius, "ridge": RIDGE},
        "seconds": round(seconds, 1),
        "device": "cpu",
        "torch": torch.__version__,
        "commit": training.COMMIT,
    }
    training.write(options.out, model, LABELS, metrics)


if __name__ == "__main__":
    main()
