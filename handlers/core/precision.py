"""A TorchScript module -> the same, frozen, in the number format that is fastest on this machine.

Which formats are right for a model is decided when its archive is built, on data (bundle/precision.py); which of those
is fast is decided here, by measurement on the worker's own device.
"""

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16", "int8"]
Wanted = Literal["auto"] | Precision | list[Precision]  # the fastest; this one; the fastest of these
INT8_NAME = "model.int8.pt"  # in an archive whose model was quantized
WORTHWHILE = 0.9  # of float32's time: a smaller gain is not worth coarser numbers
# of the outputs' norm: a guard against what cannot be right; what is right has been decided on data
LARGEST_ERROR = {"float16": 0.05, "bfloat16": 0.1, "int8": 0.3}
MEASURED_RUNS = 5


@dataclass(frozen=True)
class Candidate:
    """A module in one precision.

    Attributes:
        seconds: the shortest of its runs on the inputs that it was tried on.
    """

    precision: str
    module: torch.jit.ScriptModule
    seconds: float


def fastest(
    model: torch.jit.ScriptModule, wanted: Wanted, device: torch.device, inputs: tuple[Tensor, ...], folder: Path
) -> Candidate:
    """The module in the wanted precision, or in the fastest of those that are wanted and that the device computes by
    itself. float32 always is one of them.

    Args:
        model: takes and returns float32, as scripted. Its outputs may come back in the reduced dtype.
        inputs: a batch on the device, to measure with.
        folder: the unpacked archive, which may hold an int8 module.

    Raises:
        FileNotFoundError: int8 is wanted, and the archive has no such module.
    """
    if wanted == "int8" and not (folder / INT8_NAME).is_file():
        raise FileNotFoundError(f"the archive has no {INT8_NAME}: build it with `bundle: int8: true`")
    fixed = isinstance(wanted, str) and wanted != "auto"
    expected = main_output(model(*inputs))
    exact = trial("float32", freeze(model, "float32", device), inputs, device)
    reduced = []
    for precision in [wanted] if fixed else natively(device, folder):
        if precision == "float32" or (isinstance(wanted, list) and precision not in wanted):
            continue
        source = torch.jit.load(folder / INT8_NAME).eval() if precision == "int8" else model
        candidate = trial(precision, freeze(source, precision, device), inputs, device)
        error = relative_error(main_output(candidate.module(*inputs)), expected)
        if error <= LARGEST_ERROR[precision]:
            reduced.append(candidate)
        else:
            logger.warning("%s is not used: its outputs differ from float32's by %.0f %%", precision, 100 * error)
    best = min(reduced, key=lambda candidate: candidate.seconds, default=exact)
    return best if fixed or best.seconds < WORTHWHILE * exact.seconds else exact


def natively(device: torch.device, folder: Path) -> list[str]:
    """The reduced precisions that the device has instructions for, and the archive a module."""
    if device.type == "cuda":
        return ["bfloat16", "float16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["float16"]
    precisions = []
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            precisions.append("bfloat16")
        if torch.cpu._is_vnni_supported() and (folder / INT8_NAME).is_file():
            precisions.append("int8")
    return precisions


def trial(
    precision: str, module: torch.jit.ScriptModule, inputs: tuple[Tensor, ...], device: torch.device
) -> Candidate:
    return Candidate(precision, module, measure(module, inputs, device))


def freeze(model: torch.jit.ScriptModule, precision: str, device: torch.device) -> torch.jit.ScriptModule:
    """Weights as constants, batch norms folded into convolutions, channels last.

    Freezing under autocast writes the casts into the graph, and rounds the weights once instead of in every run.
    """
    model = model.to(memory_format=torch.channels_last)
    reduced = precision in ("bfloat16", "float16")
    autocast = torch.autocast(device.type, getattr(torch, precision) if reduced else None, enabled=reduced)
    with autocast, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.freeze(model)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm; infinite where a number is not finite."""
    error = ((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)).item()
    return error if error == error else float("inf")


def measure(module: torch.jit.ScriptModule, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """Seconds of the shortest run; the first ones, in which TorchScript specialises, do not count."""
    seconds = []
    for _ in range(2 + MEASURED_RUNS):
        start = time.perf_counter()
        module(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def main_output(outputs: Tensor | tuple) -> Tensor:
    """Models with auxiliary outputs return the main one first."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
