"""A TorchScript module -> the same, frozen, in the number format that is fastest on this machine.

Which formats are right for a model is decided on its examples, when its archive is built
(bundle/build/precision.py); without examples there is only the guard here, against what cannot be right. Which of those
is fast is decided here, by measurement on the worker's own device.
"""

import logging
import time
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from handlers.core.outputs import Outputs, tensors

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16", "int8"]
Wanted = Literal["auto"] | Precision | list[Precision]  # the fastest; this one; the fastest of these
INT8_NAME = "model.int8.pt"  # in an archive whose model was quantized
WORTHWHILE = 0.9  # of float32's time: a smaller gain is not worth coarser numbers
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05, "int8": 0.3}  # of the outputs' norm
WARM_UP_RUNS, MEASURED_RUNS = 2, 5
MEASURED_SECONDS = 1.0  # after which no further run begins

Modules = dict[str, torch.jit.ScriptModule]


def fastest(
    model: torch.jit.ScriptModule, wanted: Wanted, device: torch.device, inputs: tuple[Tensor, ...], folder: Path
) -> tuple[str, torch.jit.ScriptModule]:
    """The wanted precision, or the fastest of those that are wanted and that the device computes by itself, and the
    module in it. float32 always is one of them, and takes the place, with a warning, of one that does not work here.

    Args:
        model: takes and returns float32, as scripted. Its outputs may come back in the reduced dtype.
        inputs: a batch on the device, to measure with.
        folder: the unpacked archive, which may hold an int8 module.

    Raises:
        FileNotFoundError: int8 is wanted, and the archive has no such module.
    """
    if wanted == "int8" and not (folder / INT8_NAME).is_file():
        raise FileNotFoundError(f"the archive has no {INT8_NAME}: build it with `bundle: int8: true`")
    native = natively(device, folder)
    fixed = isinstance(wanted, str) and wanted != "auto"
    tried = [wanted] if fixed else [name for name in native if wanted == "auto" or name in wanted]
    expected = model(*inputs)
    modules: Modules = {}
    for precision in dict.fromkeys([*tried, "float32"]):  # float32 last: trying leaves the model in its layout
        try:
            if precision == "int8" and "int8" not in native:
                raise RuntimeError("the device has no instructions for it")  # it would run, and saturate
            source = torch.jit.load(folder / INT8_NAME).eval() if precision == "int8" else model
            modules[precision] = attempt(source, precision, device, inputs, expected)
        except RuntimeError as exc:
            logger.warning("the model is not frozen in %s: %s", precision, exc)
        if fixed and modules:
            break
    modules.setdefault("float32", model)
    if fixed:
        [chosen, *_] = modules
        if chosen != wanted:
            logger.warning("precision is %s, which does not work here: the model computes in %s", wanted, chosen)
        return chosen, modules[chosen]
    seconds = measure(modules, inputs, device)
    best = min(seconds, key=seconds.get)
    return (best, modules[best]) if seconds[best] < WORTHWHILE * seconds["float32"] else ("float32", modules["float32"])


def natively(device: torch.device, folder: Path) -> list[str]:
    """The reduced precisions that the device has instructions for, and the archive a module."""
    if device.type == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["float16"]
    precisions = []
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            precisions.append("bfloat16")
        if torch.cpu._is_vnni_supported() and (folder / INT8_NAME).is_file():
            precisions.append("int8")
    return precisions


def attempt(
    model: torch.jit.ScriptModule,
    precision: str,
    device: torch.device,
    inputs: tuple[Tensor, ...],
    expected: Outputs,
) -> torch.jit.ScriptModule:
    """The frozen module, in a layout that it runs in.

    Channels last first, which convolutions are fastest in. A module that takes its tensors' layout for granted (`view`
    after a convolution) does not run in it.

    Args:
        inputs: a batch on the device.
        expected: the model's outputs for it in float32.

    Raises:
        RuntimeError: it does not run, or does not compute what it should; the message says so in one line.
    """
    problem = ""
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            module = freeze(model, precision, device, layout)
            error = relative_error(module(*inputs), expected)
        except RuntimeError as exc:
            problem = f"it does not run: {str(exc).strip().splitlines()[-1]}"
            continue
        if error <= LARGEST_ERROR[precision]:
            return module
        problem = f"its outputs differ from float32's by {error:.0%} of their norm"
    model.to(memory_format=torch.contiguous_format)
    raise RuntimeError(problem)


def freeze(
    model: torch.jit.ScriptModule,
    precision: str,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> torch.jit.ScriptModule:
    """Weights as constants, batch norms folded into convolutions; the model itself is left in `layout`.

    Freezing under autocast writes the casts into the graph, and rounds the weights once instead of in every run.
    """
    model = model.to(memory_format=layout)
    reduced = precision in ("bfloat16", "float16")
    autocast = torch.autocast(device.type, getattr(torch, precision) if reduced else None, enabled=reduced)
    with autocast, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.freeze(model)


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Return the norm of the difference, as a share of the norm: the largest of the floating-point tensors; infinite
    where a number is not finite, or where the outputs differ in their shapes.
    """
    pairs = list(zip_longest(tensors(actual), tensors(expected)))
    if any(one is None or other is None or one.shape != other.shape for one, other in pairs):
        return float("inf")
    errors = [
        ((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6)).item()
        for one, other in pairs
        if other.is_floating_point()
    ]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def measure(modules: Modules, inputs: tuple[Tensor, ...], device: torch.device) -> dict[str, float]:
    """Seconds of each module's shortest run. They take turns, so that what else runs on the machine is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    deadline = time.monotonic() + MEASURED_SECONDS
    for turn in range(WARM_UP_RUNS + MEASURED_RUNS):
        if turn > WARM_UP_RUNS and time.monotonic() > deadline:
            break
        for name, module in modules.items():
            start = time.perf_counter()
            module(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: min(runs[WARM_UP_RUNS:]) for name, runs in seconds.items()}
