"""The common part of all training runs: the loop (Lightning), and the files of a run.

`command_line.py` has the options, `evaluation.py` the metrics, and `checkpoints.py` what continues a stopped run. The
`train.py` of a model has the rest: the data, its augmentation, and the recipe.
"""

import argparse
import json
import logging
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from models.checkpoints import Continuation, after_signal, read_checkpoint, set_random_state
from models.weights import save_weights

# Lightning prints what it found (no GPU, no TPU), an advertisement, and hints that do not apply here.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
for hint in ("You defined a `validation_step`", r"`isinstance\(treespec, LeafSpec\)`", "The number of training"):
    warnings.filterwarnings("ignore", hint)

Augmentation = Callable[[Tensor], Tensor]
Rows = TypeVar("Rows", Tensor, list[int])


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


def shared(batches: Iterable[Rows]) -> Iterator[Rows]:
    """Yield this process's part of each batch of row numbers, if several processes train; otherwise all of it.

    All processes take the batches of the first one, because each of them shuffles differently.
    """
    if not torch.distributed.is_initialized():
        return iter(batches)
    common = [list(batches)]
    torch.distributed.broadcast_object_list(common)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return (rows[rank::processes] for rows in common[0])


class Batches:
    """Batches of tensors that fit in memory: one index operation per batch, no worker processes.

    Args:
        tensors: inputs first, targets (int64 [N]) last; all have N as their first dimension.
        batch_size: rows in a batch.
        shuffle: use a new order in every epoch, drop the last batch if it is not full, and share the batches among the
            processes that train. Otherwise each process gets all rows.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, shuffle: bool):
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle

    def __len__(self) -> int:
        n = len(self.tensors[0])
        return n // self.batch_size if self.shuffle else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        order = (torch.randperm(n) if self.shuffle else torch.arange(n)).split(self.batch_size)[: len(self)]
        for rows in shared(order) if self.shuffle else order:
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
        self.log_loss(loss, len(target))
        return loss

    def log_loss(self, loss: Tensor, rows: int) -> None:
        """Log the loss of a batch, as "loss_step", and its mean over the epoch, as "loss_epoch"."""
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=rows)

    def validation_step(self, batch: tuple[Tensor, ...], _: int) -> None:
        *inputs, target = batch
        logits = self.model(*inputs)
        figures = {
            "val_loss": nn.functional.cross_entropy(logits, target),
            "val_accuracy": (logits.argmax(dim=1) == target).float().mean(),
        }
        self.log_dict(figures, prog_bar=True, sync_dist=True, batch_size=len(target))

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


@dataclass(frozen=True)
class Stage:
    """What `fit` trains: a classifier, on batches, measured after each epoch on those of the validation split."""

    classifier: Classifier
    batches: Iterable
    validation: Iterable[tuple[Tensor, ...]] | None = None  # inputs first, int64 targets last


def fit(options: argparse.Namespace, *stages: Stage) -> float:
    """Train stages one after the other, and return the seconds that training took.

    If several processes train, only the first one returns; the others end here.

    Raises:
        SystemExit: `--resume` names a file that is not a checkpoint of this run, or a signal ended it.
    """
    names = [f"stage-{number}" for number in range(1, len(stages) + 1)] if len(stages) > 1 else [""]
    settings = [
        {"model": options.model, "stage": name, "accumulate": options.accumulate} | asdict(stage.classifier.recipe)
        for name, stage in zip(names, stages, strict=True)
    ]
    finished: list[dict[str, Tensor]] = []
    seconds, version, part = 0.0, None, ""
    checkpoint = last = options.resume
    if checkpoint:
        state = read_checkpoint(checkpoint, settings)
        finished, seconds, version = state["finished"], state["seconds"], state["version"]
        if state["epochs"] == state["settings"]["epochs"] and not options.patience:
            # a whole stage: Lightning would not average its weights again
            finished.append(state["weights"])
            set_random_state(state["random"])
            checkpoint = None
        else:
            part = f"from-epoch-{state['epochs']}"  # because CSVLogger would delete the file of the part before
        for stage, weights in zip(stages, finished, strict=False):
            stage.classifier.load_state_dict(weights)
    for number in range(len(finished), len(stages)):
        start, stage = time.monotonic(), stages[number]
        log = TensorBoardLogger(options.log_dir, name=None, version=version, sub_dir=names[number] or None)
        version = log.version
        loggers = [CSVLogger(log.log_dir, name="", version=part), log]
        continuation = Continuation(settings[number], version, list(finished), seconds)
        trainer = make_trainer(options, stage, loggers, continuation)
        written = trainer.checkpoint_callback
        assert isinstance(written, ModelCheckpoint), "make_trainer has one"
        try:
            trainer.fit(stage.classifier, stage.batches, stage.validation, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as exc:
            raise after_signal(exc, written.last_model_path or last) from None
        last, checkpoint, part = written.last_model_path, None, ""
        if options.patience and trainer.is_global_zero:
            stage.classifier.load_state_dict(torch.load(written.best_model_path, weights_only=True)["state_dict"])
        finished.append({name: value.cpu().clone() for name, value in stage.classifier.state_dict().items()})
        seconds += time.monotonic() - start
    if torch.distributed.is_initialized():
        first = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        if not first:
            raise SystemExit
    return seconds


def make_trainer(
    options: argparse.Namespace, stage: Stage, loggers: list, continuation: Continuation
) -> lightning.Trainer:
    recipe = stage.classifier.recipe
    monitor = "loss" if stage.validation is None else "val_loss"
    callbacks: list[lightning.Callback] = [
        continuation,
        LearningRateMonitor(logging_interval="step"),
        ModelCheckpoint(
            Path(loggers[-1].log_dir) / "checkpoints",
            "best",
            monitor=monitor,
            save_last=True,
            save_on_train_epoch_end=True,
        ),
    ]
    if recipe.averaging:
        callbacks.append(EMAWeightAveraging(decay=recipe.averaging))
    if options.patience:
        callbacks.append(EarlyStopping(monitor, patience=options.patience, check_on_train_epoch_end=True))
    several = options.strategy == "ddp" or options.devices * options.num_nodes > 1
    return lightning.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        # each process has the same buffers already, but for the statistics of batch normalisation, of which the first
        # process's are kept
        strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        max_epochs=recipe.epochs,
        callbacks=callbacks,
        logger=loggers,
        log_every_n_steps=10,
        enable_model_summary=False,
    )


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
    model: nn.Module,
    labels: list[str],
    recipe: Recipe,
    seconds: float,
    report: dict,
) -> None:
    """Write the files of a run, and print its metrics.

    Args:
        options: of the run; `--out` is the folder to write to.
        model: after `round_weights`.
        labels: of the classes, in their order.
        recipe: of the run.
        seconds: of training.
        report: the metrics, measured after `round_weights`.
    """
    metrics = {
        **report,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "seed": options.seed,
        "seconds": round(seconds),
        "processes": options.devices * options.num_nodes,
        "precision": options.precision,
        "accumulate": options.accumulate,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": COMMIT,
    }
    write(options.out, model, labels, metrics)


def write(folder: Path, model: nn.Module, labels: list[str], metrics: dict) -> None:
    """Write weights.safetensors, index_to_name.json and metrics.json into a folder, and print the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "weights.safetensors")
    (folder / "index_to_name.json").write_text(json.dumps(dict(enumerate(labels)), indent=2) + "\n")
    matrix = metrics.pop("confusion_matrix")
    text = json.dumps(metrics, indent=2)
    rows = ",\n".join("    " + json.dumps(row, separators=(",", ":")) for row in matrix)
    text = text.removesuffix("\n}") + ',\n  "confusion_matrix": [\n' + rows + "\n  ]\n}\n"
    (folder / "metrics.json").write_text(text)
    print_figures(metrics)
    print(f"Wrote weights.safetensors, index_to_name.json and metrics.json into {folder}.")
    if (folder / "reference.json").exists():
        print("Its reference.json is that of the previous weights. Record it again: models/README.md, References.")


def print_figures(metrics: dict) -> None:
    """Print the numbers of metrics.json, a line for each group."""
    for name, value in metrics.items():
        if isinstance(value, int | float | str):
            print(f"{name}: {value}")
        elif isinstance(value, dict) and name != "recipe":
            print(f"{name}: {', '.join(f'{key} {figure}' for key, figure in value.items())}")
