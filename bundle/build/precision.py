"""Find the reduced precisions that are accurate enough for a model, on its examples, when the archive is built.

The worker measures which of them is the fastest (handlers/core/precision.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from bundle import samples
from bundle.build.dryrun import DryRun
from bundle.build.quantize import Batch, load, quantize, run
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.paths import relative
from handlers.core.precision import INT8_NAME, RequestedPrecision, freeze_checked
from handlers.core.topk import rank

BATCH = 16  # examples in a batch
MOST_NEEDED = 200  # examples to judge with; with so few, an agreement above 0.995 allows no change of a class
# Clients may compare a probability with a threshold, so a large change matters even if the class stays the same. Some
# examples may change more: those that are near a decision in float32, too.
LARGEST_MOVE = 0.05  # of a probability
MOVING_LESS = 0.95  # share of the examples


@dataclass(frozen=True)
class Accuracy:
    """How accurate a reduced precision is, compared with float32.

    Attributes:
        count: number of examples.
        agreement: share of the examples that keep their first class.
        least: the lowest agreement that is accepted.
        move: the largest change of the probability of float32's first class in MOVING_LESS of the examples; NaN if a
            probability is NaN.
    """

    count: int
    agreement: float
    least: float
    move: float

    @property
    def good(self) -> bool:
        """Whether the precision is accurate enough."""
        return self.agreement >= self.least and self.move <= LARGEST_MOVE

    def __str__(self) -> str:
        return (
            f"{self.agreement:.2%} of {self.count} examples keep their first class (at least {self.least:.2%} must), "
            f"and in {MOVING_LESS:.0%} its probability changes by at most {self.move:.3f} (allowed: {LARGEST_MOVE})"
        )


class Judge:
    """Compare modules of reduced precision with the float32 module, on examples.

    Args:
        module: the float32 module.
        batches: the examples, as the model's inputs.
        outputs_are: "logits" or "probabilities".
        least: the share of the examples that must keep their first class.
    """

    def __init__(self, module: torch.jit.ScriptModule, batches: list[Batch], outputs_are: str, least: float):
        self.module, self.batches, self.outputs_are, self.least = module, batches, outputs_are, least
        self.expected = run(module, batches)

    def accuracy(self, candidate: torch.jit.ScriptModule) -> Accuracy:
        """Return how accurate a module is."""
        before, after = self.ranked(self.expected), self.ranked(run(candidate, self.batches))
        probabilities, first = before[:, :, 0].unbind(1)
        moves = after[:, 0][after[:, 1] == first[:, None]] - probabilities
        agreement = (after[:, 1, 0] == first).double().mean().item()
        return Accuracy(len(first), agreement, self.least, moves.abs().quantile(MOVING_LESS).item())

    def ranked(self, outputs: Tensor) -> Tensor:
        """Return float32 [examples, 2, classes]: probabilities and classes, best first, as a handler ranks them."""
        return rank(outputs, self.outputs_are)

    @torch.inference_mode()
    def frozen(self, precision: str) -> tuple[bool, str]:
        """Freeze the module as a worker does; return whether it is accurate enough, and the reason."""
        inputs = self.batches[0]
        expected = self.expected[: len(inputs[0])]
        try:
            accuracy = self.accuracy(freeze_checked(self.module, precision, torch.device("cpu"), inputs, expected))
        except RuntimeError as exc:
            return False, str(exc).strip().splitlines()[-1]
        return accuracy.good, str(accuracy)


def drop_inaccurate_precisions(
    folder: ModelFolder, archive: Path, module: Path, extra: Path, config: Path
) -> list[str]:
    """Compare reduced precisions with float32 on the folder's examples, and keep those that are accurate enough.

    Args:
        archive: the model's archive in float32, whose handler decodes the examples.
        module: its TorchScript file.
        extra: the folder of its extra files. The int8 module is written there.
        config: its model-config.yaml. The setting `precision` is replaced there if workers may not choose all of them.

    Returns:
        a line for each precision that was tried.

    Raises:
        BundleError: there are too few examples, one is invalid, or the folder requires a precision that is not accurate
            enough.
    """
    batches, outputs_are = decode(folder, archive, examples(folder))
    # the half that calibrates int8 does not judge it: a module is more accurate on its calibration data
    calibration, judged = (batches[::2], batches[1::2]) if folder.bundle.int8 else ([], batches)
    judge = Judge(load(module), judged, outputs_are, folder.bundle.agreement)
    wanted, choice = choices(folder, config)
    lines: list[str] = []
    inaccurate: list[str] = []
    for precision in ("bfloat16", "float16"):
        if precision in choice:
            good, why = judge.frozen(precision)
            if precision == wanted and not good:
                raise BundleError(
                    f"{folder.name} is not accurate enough in {wanted}: {why}. Set handler: precision: to auto or "
                    "float32, replace the examples, or lower bundle: agreement:."
                )
            lines.append(f"{precision}: {why}" if good else f"{precision}: not used: {why}")
            inaccurate += [] if good else [precision]
    if inaccurate:
        accurate = [precision for precision in choice if precision not in inaccurate]
        set_precision(config, "float32" if accurate == ["float32"] else accurate)
    if folder.bundle.int8:
        lines.append(f"int8: {make_int8(folder, module, extra / INT8_NAME, calibration, judge)}")
    return lines


def choices(folder: ModelFolder, config: Path) -> tuple[RequestedPrecision, list[str]]:
    """Return the setting `precision` of a model-config.yaml, and the precisions that it allows; float32 always is."""
    wanted = (yaml.safe_load(config.read_text()).get("handler") or {}).get("precision", "auto")
    if wanted == "auto":
        return wanted, ["float32", "bfloat16", "float16", *(["int8"] if folder.bundle.int8 else [])]
    return wanted, list(dict.fromkeys(["float32", *(wanted if isinstance(wanted, list) else [wanted])]))


def make_int8(folder: ModelFolder, module: Path, target: Path, calibration: list[Batch], judge: Judge) -> str:
    """Write the int8 module to `target`, and return a line about its accuracy.

    Raises:
        BundleError: the module cannot be made on this machine, or is not accurate enough.
    """
    measured: list[Accuracy] = []

    def good_enough(candidate: torch.jit.ScriptModule) -> bool:
        measured.append(judge.accuracy(candidate))
        return measured[-1].good

    try:
        counts = quantize(module, target, calibration, good_enough)
    except RuntimeError as exc:
        raise BundleError(f"{folder.name} cannot be quantized to int8. Remove bundle: int8:.", str(exc)) from exc
    if counts is None:
        raise BundleError(
            f"{folder.name} is not accurate enough in int8: {measured[-1]}. Add or replace examples, lower bundle: "
            "agreement:, or remove bundle: int8:."
        )
    return f"{measured[-1]} ({counts[0]} of {counts[1]} layers)"


def examples(folder: ModelFolder) -> list[Path]:
    """Return the files of the folder's examples.

    Raises:
        BundleError: the examples are missing, or too few to measure the agreement that the folder requires.
    """
    if folder.bundle.examples is None:
        raise BundleError(f"{folder.name} has no examples: set bundle: examples: in its model-config.yaml.")
    files = sorted(file for file in folder.existing_folder(folder.bundle.examples).iterdir() if file.is_file())
    loss = 1 - folder.bundle.agreement
    judges = MOST_NEEDED if loss * MOST_NEEDED < 1 else math.ceil(1 / loss)
    needed = 2 * judges + 2 * BATCH if folder.bundle.int8 else judges  # calibration takes every second batch
    if len(files) < needed:
        raise BundleError(f"{folder.name} has {len(files)} examples; comparing precisions needs {needed}.")
    return files


def decode(folder: ModelFolder, archive: Path, files: list[Path]) -> tuple[list[Batch], str]:
    """Decode and collate the files with the archive's handler; return the batches, and its setting `outputs`.

    Raises:
        BundleError: the handler rejects a file.
    """
    with DryRun(archive) as worker:
        decoded = []
        for file in files:
            request, headers = {"body": file.read_bytes()}, samples.headers(file)
            [(status, body)] = worker.predict([request], [headers])
            if status != 200:
                raise BundleError(
                    f"{folder.name} rejects the example {relative(file)}. Remove or replace it. The answer: {body}"
                )
            decoded += worker.decode(request, headers)
        batches = [worker.handler.collate(decoded[start : start + BATCH]) for start in range(0, len(decoded), BATCH)]
        return batches, worker.handler.settings.outputs


def set_precision(config: Path, precision: str | list[str]) -> None:
    """Set `precision` in a model-config.yaml."""
    content = yaml.safe_load(config.read_text())
    content["handler"] = (content.get("handler") or {}) | {"precision": precision}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
