"""What a stranger's TorchScript file does not say of itself, found out by trying."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from bundle.errors import BundleError

SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384, 512)  # pixels, in the order they are tried
BATCH = 3
MNIST_SIDE = 28  # pixels: what the handler `mnist` makes

# what the images of each handler may be normalised with: mean and std of pixels in [0, 1], and whose they are
NORMALISATIONS = {
    "image_topk": {
        3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "ImageNet's"),
        1: ([0.5], [0.5], "to [-1, 1]"),
    },
    "mnist": {1: ([0.1307], [0.3081], "MNIST's")},
}
# what the other handlers collate; their files are served as they are
EXAMPLES = {
    "audio_mfcc": lambda: (torch.rand(BATCH, 16_000) * 2 - 1,),
    "text": lambda: (torch.ones(BATCH, 16, dtype=torch.int64), torch.ones(BATCH, 16, dtype=torch.int64)),
}


@dataclass(frozen=True)
class Images:
    """What an image classifier takes.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        side: pixels of the square.
        any_side: whether it runs on another side as well.
        mean: of pixels in [0, 1], one number a channel.
        std: likewise.
        origin: whose mean and std these are.
    """

    channels: int
    side: int
    any_side: bool
    mean: list[float]
    std: list[float]
    origin: str


def describe(model: torch.jit.ScriptModule, file: Path, quantised: bool) -> str:
    facts = [f"TorchScript, {file.stat().st_size / 1e6:.1f} MB"]
    # frozen models keep their weights as constants of the graph, quantised ones in packed form
    if parameters := sum(parameter.numel() for parameter in model.parameters()):
        facts.append(f"{parameters:,} parameters")
    if quantised:
        facts.append("quantised to 8 bits: it runs on the CPU only")
    return ", ".join(facts)


def find_images(
    model: nn.Module, handler: str, size: int | None, mean: list[float] | None, std: list[float] | None
) -> Images:
    """Tries channels and sides until one runs.

    Raises:
        BundleError: none does; or `size`, `mean` or `std` is not what the handler takes.
    """
    known = NORMALISATIONS[handler]
    if mean or std:
        if len(mean or []) != len(std or []) or len(mean) not in known or min(std) <= 0:
            counts = " or ".join(map(str, known))
            raise BundleError(f"MEAN and STD belong together: one number a channel ({counts}), STD above 0.")
        known = {len(mean): (mean, std, "as you said")}
    sides = SIDES
    if handler == "mnist":
        if size not in (None, MNIST_SIDE):
            raise BundleError("The handler mnist makes images of 28 x 28 pixels. For others: HANDLER=image_topk")
        sides = (MNIST_SIDE,)
    elif size:
        sides = (size,)

    failures: dict[str, str] = {}  # the first of each kind: those of a kind differ in numbers only
    for side, channels in product(sides, known):
        failure = failure_on(model, channels, side)
        if failure is None:
            any_side = failure_on(model, channels, side + 32) is None
            return Images(channels, side, any_side, *known[channels])
        failures.setdefault(re.sub(r"\d+", "", failure), f"{channels} x {side} x {side}: {failure}")
    tried = f"{sides[0]} x {sides[0]}" if len(sides) == 1 else f"N x N, N one of {', '.join(map(str, sorted(sides)))}"
    hint = "Give its SIZE; if it was traced, trace it so that the first dimension, the batch, is free."
    if others := {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}:
        hint = f"Its weights are {', '.join(others)}: save it after model.float()."
    raise BundleError(
        f"The model runs on no float32 image of {' or '.join(map(str, known))} channels and {tried} pixels. {hint}",
        "\n".join(failures.values()),
    )


def failure_on(model: nn.Module, channels: int, side: int) -> str | None:
    """What the model says against one float32 image of this shape; None if it runs."""
    try:
        with torch.no_grad():
            model(torch.rand(1, channels, side, side) * 2 - 1)
    except Exception as exc:  # a stranger's code may raise anything
        return last_line(exc)
    return None


def usual_resize(side: int) -> int:
    """256 for 224, and in this proportion for what is about as large; small images are seen whole."""
    return round(side * 256 / 224) if side >= 160 else side


def examine(model: nn.Module, inputs: tuple[Tensor, ...], report: Callable[[str], object]) -> Tensor:
    """Runs a batch, and its items alone.

    Returns:
        float32 [N, classes].

    Raises:
        BundleError: it takes no batches, does not return [N, classes], or answers differently in a batch than alone.
    """
    size = len(inputs[0])
    alone = [check_output(run(model, tuple(t[i : i + 1] for t in inputs)), 1) for i in range(size)]
    try:
        batch = check_output(run(model, inputs), size)
    except BundleError as exc:
        raise BundleError(
            "The model takes one input at a time, and no batches: was it traced with the batch size as a constant, "
            "in view(1, -1) perhaps? Script it, or write view(x.size(0), -1).",
            exc.details or str(exc),
        ) from exc
    difference = (batch - torch.cat(alone)).abs().max().item()
    spread = (batch.max() - batch.min()).item()
    if difference > 0.1 * spread:
        raise BundleError(
            f"The model answers an input differently alone and in a batch (by {difference:.3g}): it was saved in "
            "training mode. Call model.eval() before it is traced or scripted."
        )
    if difference > 1e-3 * spread:
        report(f"an answer changes by up to {difference:.2g} with its neighbours in a batch (dynamic quantisation?)")
    return batch


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> object:
    try:
        with torch.no_grad():
            outputs = model(*inputs)
            return outputs[0] if isinstance(outputs, tuple) else outputs  # whatever it is: `check_output` names it
    except Exception as exc:  # a stranger's code may raise anything
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in inputs)
        raise BundleError(f"The model does not take what the handler gives it: {shapes}.", last_line(exc)) from exc


def check_output(output: object, size: int) -> Tensor:
    """-> float32 [size, classes].

    Raises:
        BundleError: something else came out.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        if output.ndim == 2 and output.shape[0] == size and output.shape[1] > 1:
            if not output.isfinite().all():
                raise BundleError("The model answers numbers that are not finite.")
            return output.float()
        came = f"shape {list(output.shape)}"
    else:
        came = str(output.dtype) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if isinstance(output, dict):
            came += f" with the keys {', '.join(map(str, output))}"
    raise BundleError(
        f"A classifier returns floating-point numbers [{size}, classes] for a batch of {size}, or a tuple that starts "
        f"with them; out came {came}. Wrap the model so that it does, and script that."
    )


def kind_of(outputs: Tensor, report: Callable[[str], object]) -> str:
    """[N, classes] -> "probabilities" if each row is a distribution, else "logits"."""
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    distributions = within and torch.allclose(outputs.sum(dim=1), torch.ones(len(outputs)), atol=1e-3)
    kind = "probabilities" if distributions else "logits"
    report(f"answers {outputs.shape[1]} classes, as {kind}")
    if within and not distributions:
        report("all of them lie in [0, 1]: if they are sigmoids, set `outputs: probabilities` in model-config.yaml")
    return kind


def last_line(exc: Exception) -> str:
    """TorchScript's errors are tracebacks, which say the cause last."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
