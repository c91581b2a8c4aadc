"""The options that all train.py files have."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import lightning
import torch

from models.training import Recipe

EXAMPLES = """examples:
  {module} --devices 2 --precision bf16-mixed
  {module} --accelerator cpu --devices 2 --strategy ddp --threads 1
  {module} --resume build/train/{name}/version_0/checkpoints/last.ckpt
  tensorboard --logdir build/train
"""


def arguments(
    description: str, recipe: Recipe, folder: Path, *more: Callable[[argparse.ArgumentParser], object]
) -> argparse.Namespace:
    """Parse the options of a train.py, and apply `--threads` and `--seed`.

    Args:
        description: the docstring of train.py.
        recipe: the default recipe.
        folder: of the model.
        more: functions that add options of this model to the parser.
    """
    parser = basic_parser(description, folder)
    parser.epilog = EXAMPLES.format(module=parser.prog, name=folder.name)
    parser.add_argument(
        "--log-dir",
        type=Path,
        default=folder.parent.parent / "build" / "train" / folder.name,
        help="folder for logs: version_N/ has metrics.csv, checkpoints/ (best and last), TensorBoard's file",
    )
    parser.add_argument(
        "--epochs", type=positive, default=recipe.epochs, help="of the first stage, if the stages differ"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="continue a stopped run from its last checkpoint. A model with stages has a folder stage-N for each",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        metavar="EPOCHS",
        help="early stopping: end the run after this number of epochs without a lower validation loss, and keep the "
        "best weights. A model without a validation split uses the training loss",
    )
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--devices", type=positive, default=1, help="processes on this machine, each with its own GPU")
    parser.add_argument(
        "--num-nodes",
        type=positive,
        default=1,
        help="machines. Start the same command on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK in its environment",
    )
    parser.add_argument(
        "--strategy",
        default="auto",
        choices=("auto", "ddp"),
        help="ddp: each process takes an equal part of every batch, so the recipe's batch size is that of all "
        "together. auto: ddp if there are several processes",
    )
    parser.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", "bf16-mixed", "16-mixed"),
        help="of the computation; the weights stay float32 while they are trained",
    )
    parser.add_argument(
        "--accumulate", type=positive, default=1, metavar="BATCHES", help="batches whose gradients make one step"
    )
    parser.set_defaults(model=folder.name)
    for add in more:
        add(parser)
    options = parser.parse_args()
    processes = options.devices * options.num_nodes
    if recipe.batch_size % processes:
        parser.error(f"the batch size, {recipe.batch_size}, cannot be divided by {processes} processes")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # otherwise Lightning chooses another number for ddp
        torch.set_num_threads(options.threads)
    lightning.seed_everything(options.seed, verbose=False)
    return options


def basic_parser(description: str, folder: Path) -> argparse.ArgumentParser:
    """Return a parser of the options that do not depend on how a model is trained."""
    parser = argparse.ArgumentParser(
        prog=f"python -m models.{folder.name}.train", description=description, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", "data")),
        help="folder of the data set; it is downloaded if it is missing",
    )
    parser.add_argument("--out", type=Path, default=folder, help="folder for weights and metrics")
    parser.add_argument("--threads", type=positive, help="CPU threads of each process (default: one for each core)")
    return parser


def warm_start(parser: argparse.ArgumentParser) -> None:
    """Add the option `--warm-start`."""
    parser.add_argument("--warm-start", action="store_true", help="start from the weights in the model's folder")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description and the examples, and show defaults except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)
