"""Which reduced precisions are right for a model: decided on the folder's own examples, when its archive is built.

Which of those is fast is decided by the worker (handlers/core/precision.py).
"""

from pathlib import Path

import torch
import yaml

from bundle.catalog import ModelFolder, relative
from bundle.dryrun import DryRun
from bundle.errors import BundleError
from bundle.quantize import Batch, load, quantize, run
from handlers.core.precision import INT8_NAME, freeze

BATCH = 16  # examples a batch
FEWEST = 100  # examples; with fewer, one of them is more than the loss that is looked for


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
    batches = decode(folder, archive)
    least = folder.bundle.agreement
    # every other batch calibrates int8, the others judge
    calibration, judged = batches[::2], batches[1::2]
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


def decode(folder: ModelFolder, archive: Path) -> list[Batch]:
    """The folder's examples, as the archive's own handler decodes and collates them."""
    files = sorted(file for file in folder.existing_folder(folder.bundle.examples).iterdir() if file.is_file())
    if len(files) < FEWEST:
        raise BundleError(
            f"{folder.name}: {len(files)} examples are too few to compare precisions; {FEWEST} are needed."
        )
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
