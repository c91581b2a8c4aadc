"""Export a model folder's module as TorchScript, which its archive carries.

TorchServe's workers load TorchScript, although PyTorch has deprecated it. Replacing it with torch.export would change
this file and `BaseHandler`.
"""

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision.transforms._presets import ImageClassification, ObjectDetection
from ts.torch_handler.base_handler import BaseHandler

from bundle.build import torchscript, torchvision_source
from bundle.build.file_kinds import identify
from bundle.build.grad_cam import add_activations, check_activations, check_images
from bundle.build.handler import labels
from bundle.build.imports import import_file, imports_from
from bundle.build.user_modules import adapt, argument_names, count_arguments
from bundle.catalog import CONFIG_NAME, WEIGHTS_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.paths import MODELS, relative
from handlers.core.batch import BatchHandler
from handlers.core.classifier import ClassifierHandler
from handlers.core.explain import WITH_ACTIVATIONS, ExplainedHandler
from handlers.core.outputs import count_rows, main_output, tensors

SIZES = (1, 3)  # of the batches on which an export is compared


class PreprocessedImages(nn.Module):
    """A classifier or segmenter that normalises its images itself, so that they are copied to the device as bytes."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor):
        """Classify or segment images, uint8 [N, C, H, W]."""
        return self.classifier((images.float() / 255 - self.mean) / self.std)


class ExplainedImages(PreprocessedImages):
    """The same for a user's TorchScript file that also returns the activations of a layer."""

    @torch.jit.export
    def with_activations(self, images: Tensor):
        """Return the outputs for images, uint8 [N, C, H, W], and the activations."""
        normalised = (images.float() / 255 - self.mean) / self.std
        # mypy does not know the submodule's methods; TorchScript accepts no words behind the next line's comment
        return self.classifier.with_activations(normalised)  # type: ignore[operator]


def export(folder: ModelFolder, handler: BaseHandler | None, target: Path) -> None:
    """Write the folder's module to `target` as TorchScript, and check that the file computes the same as the module.

    Args:
        handler: the folder's, of `load_handler`.

    Raises:
        BundleError: the weights are missing, the file computes something else, the number of classes is not that of
            the labels, or the layer for Grad-CAM is invalid.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source = folder.bundle.serialized
    is_classifier = isinstance(handler, ClassifierHandler)
    # only one of the two modules returns a classifier's auxiliary outputs
    served = main_output if is_classifier else all_outputs
    if source and not source.mean:
        file = folder.existing(source.file)
        module = load_torchscript(file)
        if isinstance(handler, BatchHandler):
            check_arguments(folder, handler, module)
        if adapt(module, folder.bundle.handler) is module:
            shutil.copy(file, target)
            if has_activations(module, handler):
                batches = with_batches(module, lambda size: example_batch(folder, handler, size))[1]
                check_activations(folder.name, module, batches, served)
            return
    eager, inputs = load(folder, handler)
    if layer := folder.bundle.grad_cam:
        if not isinstance(handler, ExplainedHandler):
            raise BundleError(f"{folder.name}: bundle: grad_cam: needs a handler with explanations.")
        check_images(folder.name, inputs)
        within = "classifier" if isinstance(eager, PreprocessedImages) else ""
        eager = add_activations(folder.name, eager, layer, within)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "Scripted .* always returns")  # GoogLeNet and Inception: see `main_output`
        torchscript.save(torch.jit.script(eager), target)
        exported = torch.jit.load(target)
        compare(folder.name, eager, exported, inputs, served)
        if has_activations(exported, handler):
            check_activations(folder.name, exported, inputs, served)
        if is_classifier:
            classes, names = main_output(exported(*inputs[0])).shape[-1], labels(folder, handler) or []
            if classes != len(names):
                raise BundleError(
                    f"{folder.name}: the model has {classes} classes, but there are {len(names)} labels. Correct "
                    "index_to_name.json."
                )


def check_arguments(folder: ModelFolder, handler: BatchHandler, module: torch.jit.ScriptModule) -> None:
    """Check that a module takes what the handler's setting `arguments` names, if the handler has this setting.

    Raises:
        BundleError: it takes another number of arguments.
    """
    given = getattr(handler.settings, "arguments", None)
    if given is not None and count_arguments(module) != len(given):
        raise BundleError(
            f"{folder.name}: the module takes {', '.join(argument_names(module))}, and the handler gives it "
            f"{', '.join(given)}. Write what it takes into the section `handler:` of {CONFIG_NAME}, in its order, such "
            "as `arguments: [ids, mask, types]`."
        )


def has_activations(module: torch.jit.ScriptModule, handler: BaseHandler | None) -> bool:
    """Return whether explanations will read the activations of a layer."""
    return isinstance(handler, ExplainedHandler) and hasattr(module, WITH_ACTIVATIONS)


def all_outputs(outputs: object) -> list[Tensor]:
    return list(tensors(outputs))


def load(folder: ModelFolder, handler: BaseHandler | None) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """Return the module in evaluation mode, and inputs of several batch sizes to try it with.

    Raises:
        BundleError: the module's file, or the weights, are missing or invalid.
    """
    source = folder.bundle
    if source.torchvision:
        module, preset = torchvision_source.load(source.torchvision)
        check_kind(folder, source.torchvision.name, handler, preset)
        if isinstance(preset, ObjectDetection):
            return module, [example_batch(folder, handler, size) for size in SIZES]
        mean, std = preset.mean, preset.std
    elif source.serialized:
        module = load_torchscript(folder.existing(source.serialized.file))
        if not source.serialized.mean or not source.serialized.std:
            return with_batches(adapt(module, source.handler), lambda size: example_batch(folder, handler, size))
        mean, std = source.serialized.mean, source.serialized.std
    else:
        weights = folder.path / WEIGHTS_NAME
        if not weights.is_file() and (folder.path / "train.py").is_file():
            how = f"make train MODEL={folder.name}" if folder.path.parent == MODELS else "its train.py writes them"
            raise BundleError(f"There is no {relative(weights)}. Train the model first: {how}")
        with imports_from(folder.extra_files):
            model = import_model(folder.name, folder.existing("model.py"))
            inputs = [model.example_inputs(size) for size in SIZES]
            if not all(isinstance(each, tuple) for each in inputs):
                raise BundleError(
                    f"{relative(folder.path / 'model.py')}: example_inputs must return a tuple with one tensor for "
                    f"each argument of the module's forward, not a {type(inputs[0]).__name__}."
                )
            return model.build(), inputs
    shape = image_shape(folder, handler)
    preprocessed = ExplainedImages if hasattr(module, WITH_ACTIVATIONS) else PreprocessedImages
    return with_batches(preprocessed(module, mean, std).eval(), lambda size: (random_images(size, *shape),))


def check_kind(folder: ModelFolder, name: str, handler: BaseHandler | None, preset: torchvision_source.Preset) -> None:
    """Check that a handler for classifiers has a classifier, and the reverse.

    Args:
        name: of the model.

    Raises:
        BundleError: it does not.
    """
    if isinstance(handler, ClassifierHandler) != isinstance(preset, ImageClassification):
        raise BundleError(
            f"{folder.name}: {relative(folder.handler_file)} does not serve models such as {name}. "
            f"Write `handler: {torchvision_source.HANDLERS[type(preset)]}`."
        )


def example_batch(folder: ModelFolder, handler: BaseHandler | None, size: int) -> tuple[Tensor, ...]:
    """Return a batch of the handler's example, with random pixels if it is an image.

    Raises:
        BundleError: the handler has no example.
    """
    if not isinstance(handler, BatchHandler):
        raise BundleError(f"{folder.name}: {relative(folder.handler_file)} does not serve models of torchvision.")
    first, *others = handler.collate([handler.example()] * size)
    return random_images(*first.shape) if first.dtype == torch.uint8 else first, *others


def with_batches(
    module: nn.Module, batch: Callable[[int], tuple[Tensor, ...]]
) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """Return a user's module with the batches on which it runs: only one of a single input if it takes no batch."""
    batches = [batch(size) for size in SIZES]
    try:
        with torch.no_grad():
            outputs = module(*batches[-1])
            takes_batch = count_rows(outputs[0] if isinstance(outputs, tuple) else outputs) == SIZES[-1]
    except Exception:  # the user's model can raise anything; what fails on one input, too, fails in the comparison
        takes_batch = False
    return module, batches if takes_batch else batches[:1]


@functools.cache  # TorchScript gives the classes of a second import other names: the archive's content would change
def import_model(name: str, file: Path) -> ModuleType:
    """Import the model.py of the folder with this name."""
    return import_file(f"models.{name}.model", file)


def image_shape(folder: ModelFolder, handler: BaseHandler | None) -> torch.Size:
    """Return the shape [C, H, W] of the images that the folder's handler makes.

    Raises:
        BundleError: the handler makes something else.
    """
    example = handler.example().tensors if isinstance(handler, BatchHandler) else None
    if not isinstance(example, Tensor) or example.dtype != torch.uint8 or example.ndim != 3:
        raise BundleError(
            f"{folder.name}: `mean` and `std` need a handler that makes uint8 images [C, H, W]; "
            f"{relative(folder.handler_file)} does not. Remove them, and normalise inside the module."
        )
    return example.shape


def load_torchscript(file: Path) -> torch.jit.ScriptModule:
    """Load a TorchScript file onto the CPU, in evaluation mode.

    Raises:
        BundleError: the file is missing, or is not TorchScript. Another kind of file is named without unpickling it.
    """
    if not file.is_file():
        raise BundleError(f"There is no file {relative(file)}.")
    try:
        return torch.jit.load(file, map_location="cpu").eval()
    except (RuntimeError, ValueError) as exc:
        raise identify(file).error(file, str(exc)) from exc


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def compare(
    name: str,
    eager: nn.Module,
    exported: nn.Module,
    inputs: list[tuple[Tensor, ...]],
    served: Callable[[object], object],
) -> None:
    """Check that both modules compute the same from the inputs.

    Args:
        served: takes what is compared out of a module's outputs.

    Raises:
        BundleError: they differ.
    """
    for arguments in inputs:
        try:
            actual, expected = served(exported(*arguments)), served(eager(*arguments))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        except AssertionError as exc:
            raise BundleError(
                f"{name}: the exported TorchScript module computes something else than the Python module. Check what "
                "torch.jit.script makes of it.",
                str(exc),
            ) from exc
