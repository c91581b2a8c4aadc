"""Quantize a float32 TorchScript module to int8: static post-training quantization in graph mode."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver, QConfig
from torch.ao.quantization.quantize_jit import convert_jit, prepare_jit

from bundle.build import torchscript
from bundle.errors import BundleError
from handlers.core.outputs import main_output

Batch = tuple[Tensor, ...]

# All 8 bits of an activation. The default leaves one unused for processors without VNNI, but workers use the int8
# module only on processors that have it (handlers/core/precision.py).
QCONFIG = QConfig(
    activation=HistogramObserver.with_args(dtype=torch.quint8),
    weight=PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
)
ENGINE = "x86"  # of torch's quantized kernels
LAYERS = ("Conv1d", "Conv2d", "Conv3d", "Linear")


def quantize(
    file: Path, target: Path, calibration: list[Batch], good_enough: Callable[[torch.jit.ScriptModule], bool]
) -> tuple[int, int] | None:
    """Write the int8 module of `file` to `target`.

    If the module is not accurate enough, its most sensitive layers stay in float32: one, two, four and so on, at most
    half of them.

    Args:
        calibration: batches from which the ranges of the activations are measured.
        good_enough: whether a module is accurate enough.

    Returns:
        the number of layers in int8, and of all layers; None if half of them in int8 are still too many.

    Raises:
        BundleError: this processor has no VNNI, so it cannot run the module as a worker does.
        RuntimeError: the module cannot be quantized.
    """
    if ENGINE not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        raise BundleError(
            "int8 modules are made and checked on a processor with VNNI, which this machine does not have. Build the "
            "archive on another machine, or remove bundle: int8:."
        )
    sensitive: list[str] = []
    names = layers(file)
    half = len(names) // 2
    for kept in sorted({0, half, *(1 << power for power in range(half.bit_length()))}):
        if kept and not sensitive:
            sensitive = by_sensitivity(file, target, calibration, names)
        try:
            convert(file, target, calibration, sensitive[:kept])
        except RuntimeError:
            if not kept:
                raise
            continue  # TorchScript cannot leave out every set of layers: those of one type may belong together
        if good_enough(load(target)):
            return len(names) - kept, len(names)
    target.unlink(missing_ok=True)
    return None


def convert(file: Path, target: Path, calibration: list[Batch], in_float32: list[str]) -> None:
    """Quantize all layers except those `in_float32`, with the ranges of the activations in the calibration batches."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation, and of the observers' defaults
        module = prepare_jit(load(file), {"": QCONFIG, **dict.fromkeys(in_float32)})
        for batch in calibration:
            module(*batch)
        torch.backends.quantized.engine = ENGINE
        torchscript.save(convert_jit(module), target)


def by_sensitivity(file: Path, scratch: Path, calibration: list[Batch], names: list[str]) -> list[str]:
    """Return the layers, most sensitive first: leaving one in float32 reduces the error most."""
    expected = run(load(file), calibration)
    errors = {}
    for name in names:
        with suppress(RuntimeError):  # TorchScript cannot leave it out alone
            convert(file, scratch, calibration, [name])
            errors[name] = (run(load(scratch), calibration) - expected).square().sum().item()
    return sorted(errors, key=errors.__getitem__)


def layers(file: Path) -> list[str]:
    """Return the names of the submodules that can be quantized."""
    return [name for name, module in load(file).named_modules() if getattr(module, "original_name", "") in LAYERS]


def load(file: Path) -> torch.jit.ScriptModule:
    """Load a TorchScript file onto the CPU, in evaluation mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.load(file, map_location="cpu").eval()


@torch.inference_mode()
def run(module: torch.jit.ScriptModule, batches: list[Batch]) -> Tensor:
    """Return the outputs for all batches, float32 [inputs, classes]."""
    return torch.cat([main_output(module(*batch)) for batch in batches]).float()
