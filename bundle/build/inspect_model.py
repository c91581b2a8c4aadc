"""Find out what a TorchScript file takes and returns, by running it on trial inputs."""

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
MNIST_SIDE = 28  # pixels of the images that the handler `mnist` makes

# by handler and number of channels: the usual mean and std of pixels in [0, 1], and whose they are
NORMALISATIONS: dict[str, dict[int, tuple[list[float], list[float], str]]] = {
    "image_topk": {
        3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "ImageNet's"),
        1: ([0.5], [0.5], "to [-1, 1]"),
    },
    "mnist": {1: ([0.1307], [0.3081], "MNIST's")},
}
# trial inputs as the other handlers collate them; their models are served without a change
EXAMPLES: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "audio_mfcc": lambda: (torch.rand(BATCH, 16_000) * 2 - 1,),
    "text": lambda: (torch.ones(BATCH, 16, dtype=torch.int64), torch.ones(BATCH, 16, dtype=torch.int64)),
}


@dataclass(frozen=True)
class Images:
    """The images that a classifier takes.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        side: of the square, in pixels.
        any_side: whether the model also runs on images of another size.
        mean, std: for normalising pixels in [0, 1], one number a channel.
        origin: where mean and std come from.
    """

    channels: int
    side: int
    any_side: bool
    mean: list[float]
    std: list[float]
    origin: str


def describe(model: torch.jit.ScriptModule, file: Path, quantised: bool) -> str:
    """Return the size of the file and the number of its parameters, in words."""
    facts = [f"TorchScript, {file.stat().st_size / 1e6:.1f} MB"]
    # no number of parameters for frozen and quantised models: their weights are constants, or packed
    if parameters := sum(parameter.numel() for parameter in model.parameters()):
        facts.append(f"{parameters:,} parameters")
    if quantised:
        facts.append("quantised to 8 bits, so it runs on the CPU only")
    return ", ".join(facts)


def find_images(
    model: nn.Module, handler: str, size: int | None, mean: list[float] | None, std: list[float] | None
) -> Images:
    """Return the first kind of image that the model runs on.

    Args:
        size, mean, std: of `NewModel`.

    Raises:
        BundleError: the model runs on none of them, or `size`, `mean` or `std` does not fit the handler.
    """
    known = NORMALISATIONS[handler]
    if mean or std:
        if not mean or not std or len(mean) != len(std) or len(mean) not in known or min(std) <= 0:
            counts = " or ".join(map(str, known))
            raise BundleError(
                f"MEAN and STD are invalid. Set both, with one number for each channel ({counts}), and STD above 0."
            )
        known = {len(mean): (mean, std, "as given")}
    sides: tuple[int, ...] = SIDES
    if handler == "mnist":
        if size not in (None, MNIST_SIDE):
            raise BundleError(
                "The handler mnist makes images of 28 x 28 pixels. For other sizes, set HANDLER=image_topk."
            )
        sides = (MNIST_SIDE,)
    elif size:
        sides = (size,)

    failures: dict[str, str] = {}  # the first of each kind; others of the kind differ in numbers only
    for side, channels in product(sides, known):
        failure = failure_on(model, channels, side)
        if failure is None:
            any_side = failure_on(model, channels, side + 32) is None
            return Images(channels, side, any_side, *known[channels])
        failures.setdefault(re.sub(r"\d+", "", failure), f"{channels} x {side} x {side}: {failure}")
    tried = f"{sides[0]} x {sides[0]}" if len(sides) == 1 else f"N x N (N: {', '.join(map(str, sorted(sides)))})"
    hint = "Set SIZE. If the model was traced, trace it with a dynamic batch size (the first dimension)."
    if others := {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}:
        hint = f"Its weights are {', '.join(others)}: call model.float() before saving it."
    raise BundleError(
        f"The model does not run on float32 images of {' or '.join(map(str, known))} channels and {tried} pixels. "
        + hint,
        "\n".join(failures.values()),
    )


def failure_on(model: nn.Module, channels: int, side: int) -> str | None:
    """Run the model on one float32 image; return the last line of its error, or None if it runs."""
    try:
        with torch.no_grad():
            model(torch.rand(1, channels, side, side) * 2 - 1)
    except Exception as exc:  # the user's model can raise anything
        return last_line(exc)
    return None


def usual_resize(side: int) -> int:
    """Return 256 pixels for a side of 224, the same proportion for similar sides, and small sides unchanged."""
    return round(side * 256 / 224) if side >= 160 else side


def examine(model: nn.Module, inputs: tuple[Tensor, ...], report: Callable[[str], object]) -> Tensor:
    """Run a batch, and each of its inputs alone.

    Returns:
        the batch's outputs, float32 [N, classes].

    Raises:
        BundleError: the model does not return [N, classes], or returns something else for an input in a batch than for
            the input alone.
    """
    size = len(inputs[0])
    alone = torch.cat([check_output(run(model, tuple(t[i : i + 1] for t in inputs)), 1) for i in range(size)])
    try:
        batch = check_output(run(model, inputs), size)
    except BundleError:
        report(
            "takes one input, and no batch: it was probably traced with a constant batch size, for example "
            "view(1, -1). It is served, but the inputs of a batch run one after the other, so that a batch of N takes "
            "N times as long as one input. Script it, or use view(x.size(0), -1)"
        )
        return alone
    difference = (batch - alone).abs().max().item()
    spread = (batch.max() - batch.min()).item()
    if difference > 0.1 * spread:
        raise BundleError(
            f"The model's outputs for an input depend on the rest of its batch (by {difference:.3g}): it was saved in "
            "training mode. Call model.eval() before tracing or scripting it."
        )
    if difference > 1e-3 * spread:
        report(
            f"outputs change by up to {difference:.2g} with the rest of the batch, as dynamic quantisation makes them"
        )
    return batch


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> object:
    """Return the model's output, the first of a tuple, whatever its type.

    Raises:
        BundleError: the model fails on these inputs.
    """
    try:
        with torch.no_grad():
            outputs = model(*inputs)
            return outputs[0] if isinstance(outputs, tuple) else outputs
    except Exception as exc:  # the user's model can raise anything
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in inputs)
        raise BundleError(f"The model fails on the inputs that the handler makes: {shapes}.", last_line(exc)) from exc


def check_output(output: object, size: int) -> Tensor:
    """Return a model's output as float32 [size, classes].

    Raises:
        BundleError: the output has another type or shape, or numbers that are not finite.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        if output.ndim == 2 and output.shape[0] == size and output.shape[1] > 1:
            if not output.isfinite().all():
                raise BundleError("The model returns numbers that are not finite.")
            return output.float()
        found = f"the shape {list(output.shape)}"
    else:
        found = str(output.dtype) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        if isinstance(output, dict):
            found += f" with the keys {', '.join(map(str, output))}"
    raise BundleError(
        f"The model returns {found}. A classifier must return floating-point numbers [{size}, classes] for a batch of "
        f"{size}, or a tuple that starts with them. Wrap the model in a module that does, and script the module."
    )


def kind_of(outputs: Tensor, report: Callable[[str], object]) -> str:
    """Return "probabilities" if each row of [N, classes] is a distribution, else "logits"."""
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    distributions = within and torch.allclose(outputs.sum(dim=1), torch.ones(len(outputs)), atol=1e-3)
    kind = "probabilities" if distributions else "logits"
    report(f"returns {outputs.shape[1]} classes, as {kind}")
    if within and not distributions:
        report("all of them are in [0, 1]: if they are sigmoids, set `outputs: probabilities` in model-config.yaml")
    return kind


def last_line(exc: Exception) -> str:
    """Return the last line of an error's message: TorchScript's messages are tracebacks, which name the cause last."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
