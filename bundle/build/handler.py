"""The handler that a model folder names, imported in this process to learn what it is and what it takes."""

import importlib.util
import inspect
from types import ModuleType

from ts.torch_handler.base_handler import BaseHandler

from bundle.build import torchvision_source
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.paths import relative
from handlers.core.batch import BatchHandler
from handlers.core.classifier import ClassifierHandler


def load_handler(folder: ModelFolder) -> BaseHandler | None:
    """Return an instance of the folder's handler; one that is a `BatchHandler` has the folder's settings.

    Returns:
        None if the file defines a function `handle` instead of a class.

    Raises:
        BundleError: the file cannot be imported, or does not define exactly one class, which is what TorchServe takes.
    """
    file = folder.handler_file
    spec = importlib.util.spec_from_file_location(f"handler_of_{folder.name}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as exc:  # whatever the author's code raises
        raise BundleError(f"{relative(file)} cannot be imported: {type(exc).__name__}: {exc}") from exc
    if inspect.isfunction(getattr(module, "handle", None)):
        return None
    classes = defined_in(module)
    if len(classes) != 1:
        names = ", ".join(each.__name__ for each in classes) or "none"
        raise BundleError(f"{relative(file)} must define exactly one class for TorchServe; it defines: {names}.")
    handler = classes[0]()
    if isinstance(handler, BatchHandler):
        handler.settings = handler.Settings.model_validate(handler_settings(folder))
    return handler


def defined_in(module: ModuleType) -> list[type]:
    return [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]


def handler_settings(folder: ModelFolder) -> dict:
    """Return the `handler:` section that the archive carries: the folder's own, over what torchvision knows."""
    source = folder.bundle.torchvision
    known = torchvision_source.handler_settings(source) if source else {}
    return known | (folder.config.get("handler") or {})


def labels(folder: ModelFolder) -> list[str] | None:
    """Return the labels by class index: torchvision's own, or the folder's; None for a handler that needs none.

    Raises:
        BundleError: a classifier's labels are missing, or the file is invalid.
    """
    if folder.bundle.torchvision:
        return torchvision_source.labels(folder.bundle.torchvision)
    if folder.has_labels or isinstance(load_handler(folder), ClassifierHandler):
        return folder.labels()
    return None
