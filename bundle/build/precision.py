"""Which reduced precisions are right for a model: decided on the folder's own examples, when its archive is built.

Which of those is fast is decided by the worker (handlers/core/precision.py).
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
from handlers.core.precision import INT8_NAME, Wanted, attempt
from handlers.core.topk import rank

BATCH = 16  # examples a batch
MOST_NEEDED = 200  # examples to judge with; among so few, an agreement above 0.995 allows no change at all
# Clients compare probabilities with thresholds of their own: one that moves further is another answer to them, even
# where the class is the same. A share of the examples may: those that are undecided in float32, too.
LARGEST_MOVE = 0.05
MOVING_LESS = 0.95  # of the examples


@dataclass(frozen=True)
class Verdict:
    """How near a reduced precision is to float32.

    Attributes:
        count: how many examples were judged.
        agreement: the share of them that keep their first class.
        least: the agreement that there must be.
        move: how far, at most, the probability of float32's first class moves in MOVING_LESS of the examples; NaN
            where a probability is.
    """

    count: int
    agreement: float
    least: float
    move: float

    @property
    def good(self) -> bool:
        return self.agreement >= self.least and self.move <= LARGEST_MOVE

    def __str__(self) -> str:
        return (
            f"{self.agreement:.2%} of {self.count} examples keep their first class ({self.least:.2%} must), and in "
            f"{MOVING_LESS:.0%} its probability moves by {self.move:.3f} or less ({LARGEST_MOVE} may be)"
        )


class Judge:
    """Compares modules with float32's on examples.

    Args:
        module: takes and returns float32.
        batches: the examples, as the model's inputs.
        outputs_are: "logits" or "probabilities".
        least: the share of the examples that must keep their first class.
    """

    def __init__(self, module: torch.jit.ScriptModule, batches: list[Batch], outputs_are: str, least: float):
        self.module, self.batches, self.outputs_are, self.least = module, batches, outputs_are, least
        self.expected = run(module, batches)

    def verdict(self, candidate: torch.jit.ScriptModule) -> Verdict:
        before, after = self.ranked(self.expected), self.ranked(run(candidate, self.batches))
        probabilities, first = before[:, :, 0].unbind(1)
        moves = after[:, 0][after[:, 1] == first[:, None]] - probabilities
        agreement = (after[:, 1, 0] == first).double().mean().item()
        return Verdict(len(first), agreement, self.least, moves.abs().quantile(MOVING_LESS).item())

    def ranked(self, outputs: Tensor) -> Tensor:
        """float32 [examples, 2, classes]: probabilities and classes, best first, as a handler ranks them."""
        return rank(outputs, self.outputs_are)

    @torch.inference_mode()
    def frozen(self, precision: str) -> tuple[bool, str]:
        """Whether the module is right as a worker freezes it, and why."""
        inputs = self.batches[0]
        expected = self.expected[: len(inputs[0])]
        try:
            verdict = self.verdict(attempt(self.module, precision, torch.device("cpu"), inputs, expected))
        except RuntimeError as exc:
            return False, str(exc).strip().splitlines()[-1]
        return verdict.good, str(verdict)


def drop_inaccurate_precisions(
    folder: ModelFolder, archive: Path, module: Path, extra: Path, config: Path
) -> list[str]:
    """Compares reduced precisions with float32 on the folder's examples, and changes what the archive is made of.

    Args:
        archive: the model's archive in float32, whose handler decodes the examples.
        module: its TorchScript file.
        extra: the folder of its extra files, for the int8 module.
        config: its model-config.yaml: precisions that workers may choose and that are wrong are left out there.

    Returns:
        a line for each precision that was tried.

    Raises:
        BundleError: there are too few examples, one cannot be decoded, or a precision that was asked for is wrong.
    """
    batches, outputs_are = decode(folder, archive, examples(folder))
    # half of them calibrate int8, so that those that judge are new to it
    calibration, judged = (batches[::2], batches[1::2]) if folder.bundle.int8 else ([], batches)
    judge = Judge(load(module), judged, outputs_are, folder.bundle.agreement)
    wanted, choice = choices(folder, config)
    lines, wrong = [], []
    for precision in ("bfloat16", "float16"):
        if precision in choice:
            good, why = judge.frozen(precision)
            if precision == wanted and not good:
                raise BundleError(
                    f"{folder.name}: its precision is {wanted}, in which {why}. Set handler: precision: to auto or "
                    "float32, give it better examples, or lower bundle: agreement:."
                )
            lines.append(f"{precision}: {why}" if good else f"{precision}: {why}: it is not used")
            wrong += [] if good else [precision]
    if wrong:
        right = [precision for precision in choice if precision not in wrong]
        set_precision(config, "float32" if right == ["float32"] else right)
    if folder.bundle.int8:
        lines.append(f"int8: {make_int8(folder, module, extra / INT8_NAME, calibration, judge)}")
    return lines


def choices(folder: ModelFolder, config: Path) -> tuple[Wanted, list[str]]:
    """The setting `precision` of a model-config.yaml, and what a worker may take by it: float32 is always among it."""
    wanted = (yaml.safe_load(config.read_text()).get("handler") or {}).get("precision", "auto")
    if wanted == "auto":
        return wanted, ["float32", "bfloat16", "float16", *(["int8"] if folder.bundle.int8 else [])]
    return wanted, list(dict.fromkeys(["float32", *(wanted if isinstance(wanted, list) else [wanted])]))


def make_int8(folder: ModelFolder, module: Path, target: Path, calibration: list[Batch], judge: Judge) -> str:
    """Writes the int8 module to `target`, and returns what there is to say of it.

    Raises:
        BundleError: it cannot be made here, or it is wrong.
    """
    verdicts: list[Verdict] = []

    def good_enough(candidate: torch.jit.ScriptModule) -> bool:
        verdicts.append(judge.verdict(candidate))
        return verdicts[-1].good

    try:
        counts = quantize(module, target, calibration, good_enough)
    except RuntimeError as exc:
        raise BundleError(f"{folder.name} does not run in int8: drop bundle: int8:.", str(exc)) from exc
    if counts is None:
        raise BundleError(
            f"{folder.name}: in int8, {verdicts[-1]}. Give it more or better examples, lower bundle: agreement:, or "
            "drop bundle: int8:."
        )
    return f"{verdicts[-1]} ({counts[0]} of {counts[1]} layers)"


def examples(folder: ModelFolder) -> list[Path]:
    """The files of the folder's examples.

    Raises:
        BundleError: there are fewer than one for each change that the agreement allows, or than MOST_NEEDED.
    """
    files = sorted(file for file in folder.existing_folder(folder.bundle.examples).iterdir() if file.is_file())
    loss = 1 - folder.bundle.agreement
    judges = MOST_NEEDED if loss * MOST_NEEDED < 1 else math.ceil(1 / loss)
    needed = 2 * judges + 2 * BATCH if folder.bundle.int8 else judges  # whole batches calibrate or judge
    if len(files) < needed:
        raise BundleError(f"{folder.name}: {len(files)} examples are too few; comparing precisions takes {needed}.")
    return files


def decode(folder: ModelFolder, archive: Path, files: list[Path]) -> tuple[list[Batch], str]:
    """Files, sent as raw bodies, as the archive's own handler decodes and collates them; its setting `outputs`."""
    with DryRun(archive) as worker:
        decoded = []
        for file in files:
            request, headers = {"body": file.read_bytes()}, samples.headers(file)
            [(status, body)] = worker.predict([request], [headers])
            if status != 200:
                raise BundleError(f"{folder.name}: the example {relative(file)} is rejected: {body}")
            decoded += worker.decode(request, headers)
        batches = [worker.handler.collate(decoded[start : start + BATCH]) for start in range(0, len(decoded), BATCH)]
        return batches, worker.handler.settings.outputs


def set_precision(config: Path, precision: str | list[str]) -> None:
    content = yaml.safe_load(config.read_text())
    content["handler"] = (content.get("handler") or {}) | {"precision": precision}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
