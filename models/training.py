"""The common part of all training runs: the loop (Lightning), the metrics (TorchMetrics), and the files of a run.

The `train.py` of a model has the rest: the data, its augmentation, and the recipe.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from models.weights import save_weights

Augmentation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a run; metrics.json records them."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float = 0.0
    warmup: float = 0.2  # share of the steps in which the learning rate rises
    floor: float = 4e-6  # final learning rate, as a share of the highest
    averaging: float = 0.0  # decay per step of the moving average of the weights; 0: no average, the last weights
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum 0.9) or "adamw"


class Batches:
    """Batches of tensors that fit in memory: one index operation per batch, no worker processes.

    Args:
        tensors: inputs first, targets (int64 [N]) last; all have N as their first dimension.
        batch_size: rows in a batch.
        shuffle: use a new order in every epoch, and drop the last batch if it is not full.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, shuffle: bool):
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle

    def __len__(self) -> int:
        n = len(self.tensors[0])
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield tuple(tensor[rows] for tensor in self.tensors)


class Classifier(lightning.LightningModule):
    """Train a model with cross-entropy and a one-cycle learning rate (Smith and Topin 2018).

    Args:
        model: takes the batch's inputs, returns logits float32 [N, classes].
        recipe: the hyper-parameters.
        augment: maps the first input of a batch, on the device, to the input of the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, augment: Augmentation | None = None):
        super().__init__()
        self.model, self.recipe, self.augment = model, recipe, augment

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        first, *others, target = batch
        if self.augment is not None:
            first = self.augment(first)
        logits = self.model(first, *others)
        loss = nn.functional.cross_entropy(logits, target, label_smoothing=self.recipe.label_smoothing)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        recipe = self.recipe
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},  # decaying biases and norms costs accuracy (He et al. 2018)
        ]
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
        else:
            optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=recipe.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=recipe.warmup,
            anneal_strategy="linear",
            div_factor=25,
            final_div_factor=1 / (25 * recipe.floor),
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def metric_collection(classes: int) -> MetricCollection:
    """Return accuracy, macro F1 and the confusion matrix (rows: truth, columns: prediction)."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "confusion_matrix": MulticlassConfusionMatrix(classes),
        }
    )


def arguments(description: str, recipe: Recipe, resumable: bool = False) -> argparse.Namespace:
    """Parse the options of a train.py, and apply `--threads` and `--seed`; `resumable` adds `--resume`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", "data")),
        help="folder of the data set; it is downloaded if it is missing",
    )
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for weights and metrics; default: the model's folder"
    )
    if resumable:
        parser.add_argument("--resume", action="store_true", help="continue from the present weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lightning.seed_everything(options.seed, verbose=False)
    return options


def fit(classifier: Classifier, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Train, on a GPU if there is one, and return the seconds it took."""
    recipe = classifier.recipe
    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        callbacks=[EMAWeightAveraging(decay=recipe.averaging)] if recipe.averaging else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.monotonic()
    trainer.fit(classifier, batches)
    return time.monotonic() - start


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], classes: int) -> dict:
    """Return {"accuracy", "macro_f1", "confusion_matrix"} of `model` on `batches`, as plain numbers."""
    collection = metric_collection(classes)
    model.eval()
    for *inputs, target in batches:
        collection.update(model(*inputs), target)
    values = collection.compute()
    return {
        "accuracy": round(values["accuracy"].item(), 5),
        "macro_f1": round(values["macro_f1"].item(), 5),
        "confusion_matrix": values["confusion_matrix"].tolist(),
    }


def measure(model: nn.Module, test: tuple[Tensor, Tensor], altered: dict[str, Tensor], classes: int) -> dict:
    """Evaluate a model on the test split, and on altered inputs.

    Args:
        model: to evaluate.
        test: inputs and targets of the test split.
        altered: {name of the alteration: the altered inputs}.
        classes: the number of classes.

    Returns:
        what `evaluate` returns for the test split, and as "accuracy_under" the accuracy for each alteration.
    """

    def evaluate_on(inputs: Tensor) -> dict:
        return evaluate(model, Batches(inputs, test[1], batch_size=200, shuffle=False), classes)

    return evaluate_on(test[0]) | {
        "accuracy_under": {name: evaluate_on(inputs)["accuracy"] for name, inputs in altered.items()}
    }


def commit() -> str:
    """Return the commit of the running code, with "+changes" if a Python file under version control differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = commit()  # at import, because the working tree may change while a model trains


def save(
    options: argparse.Namespace,
    folder: Path,
    model: nn.Module,
    labels: list[str],
    recipe: Recipe,
    seconds: float,
    report: dict,
) -> None:
    """Write weights.safetensors, index_to_name.json and metrics.json, and print the metrics.

    Args:
        options: `--out` is the folder to write to, if it is given.
        folder: the folder of the model.
        model: after `round_weights`.
        labels: of the classes, in their order.
        recipe: of the run.
        seconds: of training.
        report: the metrics, measured after `round_weights`.
    """
    folder = options.out or folder
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "weights.safetensors")
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(labels)), indent=2) + "\n")
    matrix = report.pop("confusion_matrix")
    metrics = {
        **report,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "seed": options.seed,
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": COMMIT,
    }
    text = json.dumps(metrics, indent=2)
    rows = ",\n".join("    " + json.dumps(row, separators=(",", ":")) for row in matrix)
    text = text.removesuffix("\n}") + ',\n  "confusion_matrix": [\n' + rows + "\n  ]\n}\n"
    (folder / "metrics.json").write_text(text)
    print({key: value for key, value in metrics.items() if key != "recipe"})
