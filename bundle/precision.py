"""Which reduced precisions are right for a model: decided on the folder's own examples, when its archive is built.

Which of those is fast is decided by the worker (handlers/core/precision.py).
"""

import math
from pathlib import Path

import torch
import yaml

from bundle.catalog import ModelFolder, relative
from bundle.dryrun import DryRun
from bundle.errors import BundleError
from bundle.quantize import Batch, load, quantize, run
from handlers.core.precision import INT8_NAME, freeze

BATCH = 16  # examples a batch
MOST_NEEDED = 200  # examples to judge with


def settle(folder: ModelFolder, archive: Path, module: Path, extra: Path, config: Path) -> list[str]:
    """Compares reduced precisions with float32 on the folder's examples, and changes what the archive is made of.

    Args:
        archive: the model's archive in float32, whose handler decodes the examples.
        module: its TorchScript file.
        extra: the folder of its extra files, for the int8 module.
        config: its model-config.yaml: where bfloat16 changes too many answers, the others are written there.

    Returns:
        a line for each precision that was tried.

    Raises:
        BundleError: there are too few examples, one cannot be decoded, or int8 was asked for and changes too much.
    """
    least = folder.bundle.agreement
    batches = decode(folder, archive, examples(folder))
    # half of them calibrate int8, so that those that judge are new to it
    calibration, judged = (batches[::2], batches[1::2]) if folder.bundle.int8 else ([], batches)
    expected = run(load(module), judged).argmax(dim=1)

    def agreement(candidate: torch.jit.ScriptModule) -> float:
        return (run(candidate, judged).argmax(dim=1) == expected).double().mean().item()

    def line(precision: str, share: float) -> str:
        verdict = "" if share >= least else f", fewer than {least:.2%}: it is not used"
        return f"{precision}: {share:.2%} of {len(expected)} examples keep their first class{verdict}"

    share = agreement(freeze(load(module), "bfloat16", torch.device("cpu")))
    lines = [line("bfloat16", share)]
    if share < least:
        set_precision(config, ["float32", "int8"] if folder.bundle.int8 else "float32")
    if folder.bundle.int8:
        shares = []

        def good_enough(candidate: torch.jit.ScriptModule) -> bool:
            shares.append(agreement(candidate))
            return shares[-1] >= least

        counts = quantize(module, extra / INT8_NAME, calibration, good_enough)
        if counts is None:
            raise BundleError(
                f"{folder.name}: in int8, {shares[-1]:.2%} of {len(expected)} examples keep their first class, and "
                f"{least:.2%} must. Give it more or better examples, lower bundle: agreement:, or drop bundle: int8:."
            )
        lines.append(f"{line('int8', shares[-1])} ({counts[0]} of {counts[1]} layers)")
    return lines


def examples(folder: ModelFolder) -> list[Path]:
    """The files of the folder's examples.

    Raises:
        BundleError: there are so few that a single one is more than the loss that is looked for.
    """
    files = sorted(file for file in folder.existing_folder(folder.bundle.examples).iterdir() if file.is_file())
    loss = 1 - folder.bundle.agreement
    judges = MOST_NEEDED if loss * MOST_NEEDED < 1 else math.ceil(1 / loss)
    needed = 2 * judges + 2 * BATCH if folder.bundle.int8 else judges  # whole batches calibrate or judge
    if len(files) < needed:
        raise BundleError(f"{folder.name}: {len(files)} examples are too few; comparing precisions takes {needed}.")
    return files


def decode(folder: ModelFolder, archive: Path, files: list[Path]) -> list[Batch]:
    """Files, sent as raw bodies, as the archive's own handler decodes and collates them."""
    with DryRun(archive) as worker:
        samples = []
        for file in files:
            [(status, body)] = worker.predict([{"body": file.read_bytes()}])
            if status != 200:
                raise BundleError(f"{folder.name}: the example {relative(file)} is refused: {body}")
            samples.append(worker.handler.decode(file.read_bytes()))
        return [worker.handler.collate(samples[start : start + BATCH]) for start in range(0, len(samples), BATCH)]


def set_precision(config: Path, precision: str | list[str]) -> None:
    content = yaml.safe_load(config.read_text())
    content["handler"] = (content.get("handler") or {}) | {"precision": precision}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
