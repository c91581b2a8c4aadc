"""Find out what a TorchScript file takes and returns, by running it on trial inputs: what all kinds share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from bundle.build.new_model import NewModel
from bundle.build.user_modules import argument_names, takes_list
from bundle.errors import BundleError

BATCH = 3
SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384, 512)  # pixels, in the order they are tried
LARGE_SIDES = (640, 320, 416, 1280, 1024)  # tried after these where the kind is not known

GPU_CONSTANT = re.compile(r'Device = prim::Constant\[value="cuda')

Report = Callable[[str], object]
Normalisation = tuple[list[float], list[float], str]  # mean and std of pixels in [0, 1], and whose they are

USUAL: dict[int, Normalisation] = {  # by number of channels
    3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "ImageNet's"),
    1: ([0.5], [0.5], "to [-1, 1]"),
}


@dataclass(frozen=True)
class Images:
    """The images that a model takes.

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


@dataclass(frozen=True)
class Found:
    """What was found out about a model.

    Attributes:
        classes: their number; None if the model does not show it.
        settings: of the section `handler:` of model-config.yaml, each with a comment or "".
        images: what `bundle: serialized:` says of their mean and std; None if the module takes what the handler makes.
        batch_size: most requests in one batch.
    """

    classes: int | None
    settings: dict[str, tuple[object, str]] = field(default_factory=dict)
    images: Images | None = None
    batch_size: int = 8


def describe(model: torch.jit.ScriptModule, file: Path, quantised: bool) -> str:
    """Return the size of the file and the number of its parameters, in words."""
    facts = [f"TorchScript, {file.stat().st_size / 1e6:.1f} MB"]
    # no number of parameters for frozen and quantised models: their weights are constants, or packed
    if parameters := sum(parameter.numel() for parameter in model.parameters()):
        facts.append(f"{parameters:,} parameters")
    if quantised:
        facts.append("quantised to 8 bits, so it runs on the CPU only")
    return ", ".join(facts)


def find_kind(model: torch.jit.ScriptModule, new: NewModel, report: Report) -> str:
    """Return the kind of a model whose options do not state it, by what it returns for an image.

    Raises:
        BundleError: it does not run on images, or MEAN and STD are invalid.
    """
    if takes_list(model):
        report("takes a list of images, as torchvision's detectors do (KIND=detection)")
        return "detection"
    sides = (new.size,) if new.size else (*SIDES, *LARGE_SIDES)
    try:
        images, output = find_images(model, sides, normalisations(USUAL, new.mean, new.std))
    except BundleError as exc:
        tokens = torch.ones(1, 16, dtype=torch.int64)
        if any(failure_on(model, (tokens,) * count) is None for count in (1, 2, 3)):
            raise BundleError(
                "The model runs on token ids, not on images. Set KIND=text if it is a text classifier."
            ) from exc
        raise
    kind = kind_of(output, images.side)
    if kind != "image":
        report(f"returns {words(output)} for an image, as models of KIND={kind} do")
    return kind


def kind_of(output: object, side: int) -> str:
    """Return the kind of model that returns this for one image; a classifier if no other kind does."""
    main = output[0] if isinstance(output, tuple) else output
    if isinstance(main, dict) and "out" in main:
        return "segmentation"
    if isinstance(main, list) and main and isinstance(main[0], dict):
        return "detection"
    if isinstance(main, Tensor) and main.ndim == 3:
        return "detection"
    if isinstance(main, Tensor) and main.ndim == 4 and main.shape[-1] > 1:
        return "segmentation"
    return "image"


def normalisations(
    known: Mapping[int, Normalisation], mean: list[float] | None, std: list[float] | None
) -> dict[int, Normalisation]:
    """Return the usual normalisation by number of channels, or the given one for its number of channels.

    Raises:
        BundleError: the given one does not fit.
    """
    if not mean and not std:
        return dict(known)
    if not mean or not std or len(mean) != len(std) or len(mean) not in known or min(std) <= 0:
        counts = " or ".join(map(str, known))
        raise BundleError(
            f"MEAN and STD are invalid. Set both, with one number for each channel ({counts}), and STD above 0."
        )
    return {len(mean): (mean, std, "as given")}


def accept(output: object, side: int) -> None:
    """Accept any output."""


def find_images(
    model: nn.Module,
    sides: tuple[int, ...],
    known: Mapping[int, Normalisation],
    check: Callable[[object, int], object] = accept,
) -> tuple[Images, object]:
    """Return the first kind of image that the model runs on, and its output for one.

    Args:
        sides: to try, in pixels.
        known: the normalisation by number of channels.
        check: raises BundleError for an output that is invalid for an image of this side.

    Raises:
        BundleError: the model runs on none of them, or its outputs are all invalid.
    """
    failures: dict[str, str] = {}  # the first of each kind; others of the kind differ in numbers only
    invalid: BundleError | None = None
    for side, channels in product(sides, known):
        image = torch.rand(1, channels, side, side) * 2 - 1
        try:
            with torch.no_grad():
                output = model(image)
            check(output, side)
        except BundleError as exc:
            invalid = invalid or exc
        except Exception as exc:  # the user's model can raise anything
            failure = last_line(exc)
            failures.setdefault(re.sub(r"\d+", "", failure), f"{channels} x {side} x {side}: {failure}")
        else:
            larger = torch.rand(1, channels, side + 32, side + 32)
            any_side = failure_on(model, (larger,), check) is None
            return Images(channels, side, any_side, *known[channels]), output
    if invalid:
        raise invalid
    if cause := cause_of(model):
        raise cause
    tried = f"{sides[0]} x {sides[0]}" if len(sides) == 1 else f"N x N (N: {', '.join(map(str, sorted(sides)))})"
    hint = "Set SIZE. If the model was traced, trace it with a dynamic batch size (the first dimension)."
    if others := {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}:
        hint = f"Its weights are {', '.join(others)}: call model.float() before saving it."
    raise BundleError(
        f"The model does not run on float32 images of {' or '.join(map(str, known))} channels and {tried} pixels. "
        + hint,
        "\n".join(failures.values()),
    )


def cause_of(model: nn.Module) -> BundleError | None:
    """Return why a TorchScript file runs on no trial input, if its code shows it: several inputs, or a GPU's name."""
    scripts = [each for each in model.modules() if isinstance(each, torch.jit.ScriptModule)]
    if not scripts:
        return None
    if len(inputs := argument_names(scripts[0])) > 1 and model is scripts[0]:
        return BundleError(
            f"The model takes {len(inputs)} inputs ({', '.join(inputs)}), and add-model serves models of one image or "
            "sound. Wrap it in a module that computes the others from it, or write a handler that makes them: see "
            "handlers/README.md. For token ids, their mask and their types, set KIND=text."
        )
    if GPU_CONSTANT.search(str(scripts[0].inlined_graph)):
        return BundleError(
            "The model has the name of a GPU (cuda) in its code: it was traced there, or its code names it. The lines "
            "above make a file that runs everywhere. In code of your own, write `device=x.device`.",
            'model = model.cpu().eval()\ntorch.jit.trace(model, inputs.cpu()).save("model.pt")  # or torch.jit.script',
        )
    return None


def failure_on(
    model: nn.Module, inputs: tuple[Tensor, ...], check: Callable[[object, int], object] = accept
) -> str | None:
    """Run the model; return the last line of its error, or None if it runs."""
    try:
        with torch.no_grad():
            check(model(*inputs), inputs[0].shape[-1])
    except Exception as exc:  # the user's model can raise anything
        return last_line(exc)
    return None


def describe_images(images: Images, place: str) -> list[str]:
    """Return lines that say how the handler will make the model's images.

    Args:
        place: what the handler does to an image, a line.
    """
    colour = {3: "RGB", 1: "grey"}[images.channels]
    size = f"takes {colour} images of {images.side} x {images.side} pixels"
    if images.any_side:
        size += "; it also runs on other sizes: set SIZE if it was trained on another one"
    numbers = f"mean {numbers_of(images.mean)}, std {numbers_of(images.std)}"
    normalised = f"pixels in [0, 1] are normalised with {numbers} ({images.origin}; MEAN and STD change them)"
    return [size, *([place] if place else []), normalised]


def numbers_of(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def examine(
    model: nn.Module, inputs: tuple[Tensor, ...], check: Callable[[object, int], Tensor], report: Report
) -> Tensor:
    """Run a batch, and each of its inputs alone.

    Args:
        check: returns what is compared of the outputs for some inputs, float32 [inputs, ...], or raises BundleError.

    Returns:
        what `check` returns for the batch.

    Raises:
        BundleError: the outputs are invalid, or those for an input in a batch are not those for the input alone.
    """
    size = len(inputs[0])
    alone = torch.cat([check(run(model, tuple(t[i : i + 1] for t in inputs)), 1) for i in range(size)])
    try:
        batch = check(run(model, inputs), size)
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


def random_batch(images: Images) -> tuple[Tensor, ...]:
    """Return a batch of uint8 images that differ in brightness.

    They show a batch normalisation that was left in training mode.
    """
    brightness = torch.tensor([1.0, 0.5, 0.1]).view(BATCH, 1, 1, 1)
    shape = (BATCH, images.channels, images.side, images.side)
    return ((torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) * brightness).byte(),)


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
        if cause := cause_of(model):
            raise cause from exc
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in inputs)
        raise BundleError(f"The model fails on the inputs that the handler makes: {shapes}.", last_line(exc)) from exc


def check_finite(output: Tensor) -> Tensor:
    """Return an output as float32.

    Raises:
        BundleError: it has numbers that are not finite.
    """
    if not output.isfinite().all():
        raise BundleError("The model returns numbers that are not finite.")
    return output.float()


def words(output: object) -> str:
    """Describe a model's output by its shape or type."""
    if isinstance(output, tuple):
        return f"a tuple that starts with {words(output[0])}" if output else "an empty tuple"
    if isinstance(output, Tensor):
        return f"the shape {list(output.shape)}" if output.is_floating_point() else str(output.dtype)
    if isinstance(output, dict):
        return f"a dict with the keys {', '.join(map(str, output))}"
    return f"a {type(output).__name__}"


def last_line(exc: Exception) -> str:
    """Return the last line of an error's message: TorchScript's messages are tracebacks, which name the cause last."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
