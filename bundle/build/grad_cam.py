"""Export a module that also returns the activations of a layer, from which Grad-CAM explains its answers.

The exported module has the method `with_activations` beside `forward`. Both call the same submodules, so that the file
has the weights once, and a worker's frozen module, which has only `forward`, is the same as without the method.
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from bundle.errors import BundleError
from handlers.core.explain import WITH_ACTIVATIONS
from handlers.core.outputs import tensors

OWN_METHOD = f"Define the method `{WITH_ACTIVATIONS}` in the module instead: see models/README.md."
# A cache: TorchScript gives a second class of one name another name, which would change the archive's content
CLASSES: dict[tuple[type, str], type] = {}


class ContainersTracer(fx.Tracer):
    """Trace the modules that contain a layer. All other modules stay calls, whatever they compute.

    Args:
        layer: its name in `named_modules()`.
    """

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not self.layer.startswith(f"{name}.")


def add_activations(name: str, module: nn.Module, layer: str, within: str = "") -> nn.Module:
    """Return the module with the method `with_activations`, which torch.jit.script exports.

    Args:
        name: of the model.
        layer: the name of a submodule.
        within: the submodule to whose `named_modules()` the name belongs; by default, the module itself.

    Raises:
        BundleError: there is no such layer, or the modules that contain it do not run it exactly once.
    """
    if hasattr(module, WITH_ACTIVATIONS):
        raise BundleError(
            f"{name}: the module has a method `{WITH_ACTIVATIONS}` of its own. Remove bundle: grad_cam:, and put "
            "@torch.jit.export above the method."
        )
    layers = [each for each, _ in module.get_submodule(within).named_modules() if each]
    if layer not in layers:
        close = difflib.get_close_matches(layer, layers, n=5, cutoff=0.4) or layers[-5:]
        raise BundleError(f"{name}: bundle: grad_cam: there is no layer {layer!r}. Some layers: {', '.join(close)}.")
    full_name = f"{within}.{layer}".removeprefix(".")
    try:
        graph = ContainersTracer(full_name).trace(module)
    except Exception as exc:  # the user's module can raise anything
        raise BundleError(
            f"{name}: torch.fx cannot trace the way to the layer {layer!r}. {OWN_METHOD}", str(exc)
        ) from exc
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == full_name]
    if len(calls) != 1:
        raise BundleError(f"{name}: the layer {layer!r} runs {len(calls)} times for a batch, not once. {OWN_METHOD}")
    [output] = graph.find_nodes(op="output")
    output.args = ((output.args[0], calls[0]),)
    output.type = None
    module.__class__ = class_with(type(module), fx.GraphModule(module, graph))
    return module


def class_with(original: type, traced: fx.GraphModule) -> type:
    """Return a subclass whose `with_activations` is the `forward` of a traced module.

    A method cannot be added to the class itself: TorchScript compiles a class once, with the methods that it has then.
    """
    key = (original, traced.code)
    if key not in CLASSES:
        method = torch.jit.export(type(traced).forward)
        members = {WITH_ACTIVATIONS: method, "__module__": original.__module__}
        CLASSES[key] = type(original.__name__, (original,), members)
    return CLASSES[key]


def check_images(name: str, batches: list[tuple[Tensor, ...]]) -> None:
    """Check that a module takes images, and nothing else.

    Raises:
        BundleError: it does not.
    """
    for arguments in batches:
        if len(arguments) != 1 or arguments[0].ndim != 4:
            shapes = ", ".join(str(list(each.shape)) for each in arguments)
            raise BundleError(
                f"{name}: Grad-CAM explains models that take only images [N, C, H, W]; this one takes {shapes}. "
                f"Remove bundle: grad_cam:, or the method `{WITH_ACTIVATIONS}`."
            )


def check_activations(
    name: str, module: torch.jit.ScriptModule, batches: list[tuple[Tensor, ...]], served: Callable[[object], object]
) -> None:
    """Check that the method `with_activations` returns what Grad-CAM needs.

    Args:
        name: of the model.
        batches: the arguments of the module.
        served: takes what is compared out of the module's outputs.

    Raises:
        BundleError: it does not.
    """
    check_images(name, batches)
    for arguments in batches:
        with torch.no_grad():
            returned = getattr(module, WITH_ACTIVATIONS)(*arguments)
            if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Tensor):
                raise BundleError(f"{name}: `{WITH_ACTIVATIONS}` must return two values: the outputs, and activations.")
            outputs, activations = returned
            try:
                torch.testing.assert_close(served(outputs), served(module(*arguments)), rtol=1e-4, atol=1e-4)
            except AssertionError as exc:
                message = f"{name}: `{WITH_ACTIVATIONS}` and `forward` return different outputs."
                raise BundleError(message, str(exc)) from exc
        shape = list(activations.shape)
        if len(shape) != 4 or shape[0] != len(arguments[0]) or not is_map(shape, arguments[0]):
            raise BundleError(
                f"{name}: Grad-CAM needs activations [N, C, H, W] of more than one pixel, with the sides of the image; "
                f"for a batch of {len(arguments[0])}, those of the layer have the shape {shape}. Take another layer."
            )
    check_gradients(name, module, batches[0][0], served)


def is_map(shape: list[int], images: Tensor) -> bool:
    """Return whether [N, C, H, W] has more than one pixel, and H : W as in the images; it has not in [N, H, W, C]."""
    (height, width), (image_height, image_width) = shape[2:], images.shape[2:]
    return height * width > 1 and 0.5 <= height * image_width / (width * image_height) <= 2


def check_gradients(
    name: str, module: torch.jit.ScriptModule, images: Tensor, served: Callable[[object], object]
) -> None:
    """Check that the outputs can be differentiated by the activations.

    Raises:
        BundleError: they cannot.
    """
    try:
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            outputs, activations = getattr(module, WITH_ACTIVATIONS)(images.float().requires_grad_())
            total = torch.stack([each.sum() for each in tensors(served(outputs)) if each.requires_grad]).sum()
            torch.autograd.grad(total, activations)
    except RuntimeError as exc:
        raise BundleError(
            f"{name}: the outputs cannot be differentiated by the activations. `{WITH_ACTIVATIONS}` must return those "
            "from which the outputs are computed, without detach().",
            str(exc),
        ) from exc
