"""Find out what a classifier of images or sounds takes and returns."""

import torch
from torch import Tensor, nn

from bundle.build.export import PreprocessedImages
from bundle.build.inspect_model import (
    BATCH,
    SIDES,
    USUAL,
    Found,
    Images,
    Report,
    check_finite,
    describe_images,
    examine,
    find_images,
    normalisations,
    random_batch,
    words,
)
from bundle.build.new_model import NewModel
from bundle.errors import BundleError

TWO_CLASSES = """\
class TwoClasses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        p = {score}
        return torch.cat((1 - p, p), 1)

torch.jit.script(TwoClasses(model).eval()).save("model.pt")"""
MNIST_SIDE = 28  # pixels of the images that the handler `mnist` makes
MNIST = {1: ([0.1307], [0.3081], "MNIST's")}


def inspect_images(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the size of a classifier's images, and its classes."""
    sides = (new.size,) if new.size else SIDES
    images, _ = find_images(model, sides, normalisations(USUAL, new.mean, new.std))
    resize = new.resize or usual_resize(images.side)
    place = f"images are resized to {resize} pixels on the shorter side (RESIZE), then cropped in the middle"
    for line in describe_images(images, place):
        report(line)
    classes, outputs = examine_images(model, images, report)
    settings = {
        "top_k": (5, ""),
        "resize": (resize, "pixels of the shorter side"),
        "crop": (images.side, "pixels of the square that is cut out of the middle"),
        "interpolation": ("bilinear", ""),
        "channels": (images.channels, "3: RGB, 1: grey"),
        "outputs": (outputs, ""),
    }
    return Found(classes, settings, images)


def inspect_digits(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the classes of a classifier of handwritten digits."""
    if new.size not in (None, MNIST_SIDE):
        raise BundleError("The handler mnist makes images of 28 x 28 pixels. For other sizes, set HANDLER=image_topk.")
    images, _ = find_images(model, (MNIST_SIDE,), normalisations(MNIST, new.mean, new.std))
    for line in describe_images(images, ""):
        report(line)
    classes, outputs = examine_images(model, images, report)
    return Found(classes, {"top_k": (3, ""), "outputs": (outputs, "")}, images)


def inspect_sounds(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the classes of a classifier of one second of sound, as the handler `audio_mfcc` makes it."""
    outputs = examine(model, (torch.rand(BATCH, 16_000) * 2 - 1,), check_scores, report)
    return Found(outputs.shape[1], {"top_k": (3, ""), "outputs": (describe_scores(outputs, report), "")})


# --- images ----------------------------------------------------------------------------------------------------------


def examine_images(model: nn.Module, images: Images, report: Report) -> tuple[int, str]:
    """Return the number of classes, and what the outputs are: "logits" or "probabilities"."""
    module = PreprocessedImages(model, images.mean, images.std)
    outputs = examine(module, random_batch(images), check_scores, report)
    return outputs.shape[1], describe_scores(outputs, report)


def usual_resize(side: int) -> int:
    """Return 256 pixels for a side of 224, the same proportion for similar sides, and small sides unchanged."""
    return round(side * 256 / 224) if side >= 160 else side


# --- scores ----------------------------------------------------------------------------------------------------------


def check_scores(output: object, size: int) -> Tensor:
    """Return a classifier's output as float32 [size, classes].

    Raises:
        BundleError: the output has another type or shape, or numbers that are not finite.
    """
    main = output if isinstance(output, Tensor) and output.is_floating_point() else None
    if main is not None and main.ndim == 2 and len(main) == size and main.shape[1] > 1:
        return check_finite(main)
    if main is not None and main.numel() == size and main.ndim <= 2:
        raise one_number(main)
    raise BundleError(
        f"The model returns {words(output)}. A classifier must return floating-point numbers [{size}, classes] for a "
        f"batch of {size}, or a tuple that starts with them. Wrap the model in a module that does, and script the "
        "module."
    )


def one_number(output: Tensor) -> BundleError:
    """Return the error of a model that returns one number for each input: with the lines that make it two classes."""
    probability = bool(((output >= 0) & (output <= 1)).all())
    score = "self.model(x).view(-1, 1)" if probability else "self.model(x).view(-1, 1).sigmoid()"
    return BundleError(
        f"The model returns one number for each input ({words(output)}). If it is "
        f"{'the probability' if probability else 'the logit'} of the second of two classes, wrap the model as in the "
        "lines above. If it is a quantity, such as an age, it needs a handler of its own: see handlers/README.md.",
        TWO_CLASSES.format(score=score),
    )


def describe_scores(outputs: Tensor, report: Report) -> str:
    """Return "probabilities" if each row of [N, classes] is a distribution, else "logits"."""
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    distributions = within and torch.allclose(outputs.sum(dim=1), torch.ones(len(outputs)), atol=1e-3)
    kind = "probabilities" if distributions else "logits"
    report(f"returns {outputs.shape[1]} classes, as {kind}")
    if within and not distributions:
        report("all of them are in [0, 1]: if they are sigmoids, set `outputs: probabilities` in model-config.yaml")
    return kind
