"""A float32 TorchScript module -> int8: static post-training quantization, TorchScript's own graph mode."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver, QConfig
from torch.ao.quantization.quantize_jit import convert_jit, prepare_jit

from bundle.errors import BundleError
from handlers.core.outputs import main_output

Batch = tuple[Tensor, ...]

# All 256 steps of an activation, where the default spares one bit for processors without VNNI: a worker on such a
# processor does not use the module (handlers/core/precision.py).
QCONFIG = QConfig(
    activation=HistogramObserver.with_args(dtype=torch.quint8),
    weight=PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
)
ENGINE = "x86"  # of torch's quantized kernels
LAYERS = ("Conv1d", "Conv2d", "Conv3d", "Linear")


def quantize(
    file: Path, target: Path, calibration: list[Batch], good_enough: Callable[[torch.jit.ScriptModule], bool]
) -> tuple[int, int] | None:
    """Writes the int8 module of `file` to `target`.

    The layers that the module is most sensitive to stay in float32 where it is not good enough without: one of them,
    two, four, and so on, at last half.

    Returns:
        how many layers are in int8, and how many there are; None where even half of them are too many.

    Raises:
        BundleError: this processor cannot run what a worker would.
    """
    if ENGINE not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        raise BundleError("int8 modules are made and judged on a processor with VNNI, which this one lacks.")
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
            continue  # TorchScript cannot leave out each set of layers: those of one type may have to stay together
        if good_enough(load(target)):
            return len(names) - kept, len(names)
    target.unlink(missing_ok=True)
    return None


def convert(file: Path, target: Path, calibration: list[Batch], in_float32: list[str]) -> None:
    """Quantizes all layers but those, with the ranges that activations have in the calibration batches."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and observers that speak of their own defaults
        module = prepare_jit(load(file), {"": QCONFIG, **dict.fromkeys(in_float32)})
        for batch in calibration:
            module(*batch)
        torch.backends.quantized.engine = ENGINE
        convert_jit(module).save(target)


def by_sensitivity(file: Path, scratch: Path, calibration: list[Batch], names: list[str]) -> list[str]:
    """The layers, first those that change the outputs least when they alone are left in float32."""
    expected = run(load(file), calibration)
    errors = {}
    for name in names:
        with suppress(RuntimeError):  # it cannot be left out alone
            convert(file, scratch, calibration, [name])
            errors[name] = (run(load(scratch), calibration) - expected).square().sum().item()
    return sorted(errors, key=errors.__getitem__)


def layers(file: Path) -> list[str]:
    """Names of the submodules that can be quantized."""
    return [name for name, module in load(file).named_modules() if getattr(module, "original_name", "") in LAYERS]


def load(file: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.load(file, map_location="cpu").eval()


@torch.inference_mode()
def run(module: torch.jit.ScriptModule, batches: list[Batch]) -> Tensor:
    """float32 [inputs, classes]: what the module answers to all batches."""
    return torch.cat([main_output(module(*batch)) for batch in batches]).float()
