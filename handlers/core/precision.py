"""Freeze a TorchScript module in the precision that is fastest on this machine.

Which precisions are accurate enough for a model is decided on its examples when its archive is built
(bundle/build/precision.py). Without examples, only the check against `MAX_ERROR` here applies. Which of them is fastest
is measured here, on the worker's own device.
"""

import logging
import os
import tempfile
import time
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Literal, cast

import psutil
import torch
from torch import Tensor

from handlers.core.outputs import Outputs, tensors

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16", "int8"]
RequestedPrecision = Literal["auto"] | Precision | list[Precision]  # the fastest; this one; the fastest of these
INT8_NAME = "model.int8.pt"  # in an archive whose model was quantized
WORTHWHILE = 0.9  # of float32's time: a smaller gain does not justify the rounding
MAX_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05, "int8": 0.3}  # relative to the outputs' norm
MAX_ERROR_TF32 = 1e-2  # of float32 on a GPU, where PyTorch's convolutions round products to the 10 bits of TF32
WARM_UP_RUNS, MEASURED_RUNS = 2, 5
MEASURED_SECONDS = 1.0  # after this time no further run starts

Modules = dict[str, torch.jit.ScriptModule]


def fastest(
    model: torch.jit.ScriptModule,
    requested: RequestedPrecision,
    device: torch.device,
    inputs: tuple[Tensor, ...],
    folder: Path,
) -> tuple[str, torch.jit.ScriptModule]:
    """Freeze the model in the requested precision, or in the fastest one of several.

    Of several, only those that the device supports natively are tried, and float32. All workers of a server take the
    choice of the first one, so that equal inputs get equal answers. If a single requested precision does not work here,
    a warning is logged, and the model computes in float32.

    Args:
        model: scripted in float32.
        requested: the setting `precision`.
        device: of the worker.
        inputs: a batch on the device, for the measurement.
        folder: the unpacked archive, which may contain an int8 module.

    Returns:
        the precision, and the module. Its outputs may have the reduced dtype.

    Raises:
        FileNotFoundError: int8 is requested, but the archive has no int8 module.
    """
    if requested == "int8" and not (folder / INT8_NAME).is_file():
        raise FileNotFoundError(f"the archive has no {INT8_NAME}: build it with `bundle: int8: true`")
    choice = choice_file(folder)
    if (requested == "auto" or isinstance(requested, list)) and choice and choice.is_file():
        requested = cast(Precision, choice.read_text())
    native = native_precisions(device, folder)
    fixed = isinstance(requested, str) and requested != "auto"
    tried = [requested] if fixed else [name for name in native if requested == "auto" or name in requested]
    expected = model(*inputs)
    modules: Modules = {}
    for precision in dict.fromkeys([*tried, "float32"]):  # float32 last: a trial changes the layout of the model
        try:
            if precision == "int8" and "int8" not in native:
                raise RuntimeError("the device has no instructions for it")  # it would run, but saturate
            source = torch.jit.load(folder / INT8_NAME).eval() if precision == "int8" else model
            modules[precision] = freeze_checked(source, precision, device, inputs, expected)
        except RuntimeError as exc:
            logger.warning("the model is not frozen in %s: %s", precision, exc)
        if fixed and modules:
            break
    modules.setdefault("float32", model)
    if fixed:
        [chosen, *_] = modules
        if chosen != requested:
            logger.warning("precision is %s, which does not work here: the model computes in %s", requested, chosen)
        return chosen, modules[chosen]
    seconds = measure(modules, inputs, device)
    best = min(seconds, key=lambda name: seconds[name])
    own = best if seconds[best] < WORTHWHILE * seconds["float32"] else "float32"
    first = record_first(choice, own) if choice else own
    return (first, modules[first]) if first in modules else (own, modules[own])


def choice_file(folder: Path) -> Path | None:
    """Return the file with the choice of a version's first worker; None if TorchServe has not unpacked this folder.

    The file is beside the folder, which has only what was archived and what handlers wrote. Its name has the
    process of TorchServe: the next one may run on another machine, and in a container with the same process id. The
    hash has the process's start, too, in a form that does not change with the clock.
    """
    folder = folder.resolve()
    if folder.parent != Path(os.environ.get("TEMP", ""), "models").resolve():
        return None
    return folder.with_name(f"{folder.name}.precision-{hash(psutil.Process(os.getppid()))}")


def record_first(file: Path, choice: str) -> str:
    """Write a worker's choice to the file, unless another worker was first, and return what the file has."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as written:
            written.write(choice)
            written.flush()
            os.link(written.name, file)  # whole from the beginning, and only for one of several workers
    except FileExistsError:
        return file.read_text()
    except OSError as exc:  # such as a full disk
        logger.warning("workers of this model may choose different precisions: %s", exc)
    return choice


def native_precisions(device: torch.device, folder: Path) -> list[str]:
    """Return the reduced precisions that the device has instructions for; int8 only if the archive has a module."""
    if device.type == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["float16"]
    precisions = []
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            precisions.append("bfloat16")
        if torch.cpu._is_vnni_supported() and (folder / INT8_NAME).is_file():
            precisions.append("int8")
    return precisions


def freeze_checked(
    model: torch.jit.ScriptModule,
    precision: str,
    device: torch.device,
    inputs: tuple[Tensor, ...],
    expected: Outputs,
) -> torch.jit.ScriptModule:
    """Freeze a model in a memory layout in which it runs, and check its outputs.

    Channels last is tried first, because convolutions are fastest in it. A module that depends on the contiguous layout
    (`view` after a convolution) does not run in it.

    Args:
        model: left in the contiguous layout if it cannot be frozen.
        precision: to compute in.
        device: of the worker.
        inputs: a batch on the device.
        expected: the model's outputs for `inputs` in float32.

    Raises:
        RuntimeError: the frozen module does not run, or its outputs are wrong. The message is one line.
    """
    problem = ""
    for layout in (torch.channels_last, torch.contiguous_format):
        try:
            module = freeze(model, precision, device, layout)
            for _ in range(3 if device.type == "cuda" else 1):  # on a GPU, a fuser compiles kernels in the second run
                outputs = module(*inputs)
            error = relative_error(outputs, expected)
        except RuntimeError as exc:
            problem = f"it does not run: {str(exc).strip().splitlines()[-1]}"
            continue
        if error <= max_error(precision, device):
            return module
        problem = f"its outputs differ from float32's by {error:.0%} of their norm"
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's types lack it
    raise RuntimeError(problem)


def max_error(precision: str, device: torch.device) -> float:
    """Return the largest `relative_error` that is accepted."""
    return MAX_ERROR_TF32 if precision == "float32" and device.type == "cuda" else MAX_ERROR[precision]


def freeze(
    model: torch.jit.ScriptModule,
    precision: str,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> torch.jit.ScriptModule:
    """Freeze a model: weights become constants, and batch norms are folded into convolutions.

    Freezing under autocast writes the casts into the graph, and rounds the weights once instead of in every run. The
    model itself is left in `layout`.
    """
    model = model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's types lack it
    reduced = precision in ("bfloat16", "float16")
    autocast = torch.autocast(device.type, getattr(torch, precision) if reduced else None, enabled=reduced)
    with autocast, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.freeze(model)


def relative_error(actual: Outputs, expected: Outputs) -> float:
    """Return the largest relative error of the floating-point outputs: norm of the difference / norm.

    It is infinite if a number is not finite, or if the outputs differ in number or shape.
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
    """Return the seconds of each module's fastest run. The modules take turns, so that other load affects all alike."""
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
