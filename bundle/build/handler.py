"""The handler that a model folder names, imported in this process to learn what it is and what it takes."""

import inspect
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError
from ts.torch_handler.base_handler import BaseHandler

from bundle.build import torchvision_source
from bundle.build.imports import import_file, imports_from
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.paths import relative
from handlers.core.batch import BatchHandler
from handlers.core.labelled import LabelledHandler


def load_handler(folder: ModelFolder) -> BaseHandler | None:
    """Return an instance of the folder's handler, not initialized; a `BatchHandler` has the folder's settings.

    Returns:
        None if the file defines a function `handle` instead of a class.

    Raises:
        BundleError: the file cannot be imported, does not define exactly one class, lacks a method, or the settings
            are invalid.
    """
    file = folder.handler_file
    with imports_from(folder.extra_files):
        try:
            module = import_file(f"handler_of_{folder.name}", file)
        except Exception as exc:  # the user's code can raise anything
            raise BundleError(
                f"{relative(file)} cannot be imported: {type(exc).__name__}: {exc}. "
                "A module that it imports must be installed, or listed under `bundle: files:`."
            ) from exc
    if inspect.isfunction(getattr(module, "handle", None)):
        return None
    classes = classes_of(module)
    if len(classes) != 1:
        names = ", ".join(each.__name__ for each in classes) or "none"
        raise BundleError(
            f"{relative(file)} must define exactly one class, the handler; it defines: {names}. "
            "Put other classes into a module, and list it under `bundle: files:`."
        )
    handler = classes[0]()
    if isinstance(handler, BatchHandler):
        check_methods(type(handler), file)
        try:
            handler.settings = handler.Settings.model_validate(handler_settings(folder))
        except ValidationError as exc:
            raise folder.invalid_section("handler", exc) from exc
    return handler


def check_methods(handler: type[BatchHandler], file: Path) -> None:
    """Check that a handler defines what `BatchHandler` leaves open.

    Raises:
        BundleError: a method is missing.
    """
    for name in ("decode", "example", "encode"):
        if getattr(handler, name) is getattr(BatchHandler, name):
            raise BundleError(
                f"{relative(file)}: {handler.__name__} must define `{name}`. See handlers/README.md for an example."
            )


def classes_of(module: ModuleType) -> list[type]:
    """Return the classes that a module defines itself, as TorchServe finds its handler."""
    return [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]


def handler_settings(folder: ModelFolder) -> dict:
    """Return the `handler:` section that the archive carries: the folder's own, over what torchvision knows."""
    source = folder.bundle.torchvision
    known = torchvision_source.handler_settings(source) if source else {}
    return known | (folder.config.get("handler") or {})


def labels(folder: ModelFolder, handler: BaseHandler | None) -> list[str] | None:
    """Return the labels by class index: torchvision's own, or the folder's; None for a handler that needs none.

    Args:
        handler: the folder's, of `load_handler`.

    Raises:
        BundleError: the labels are missing, or the file is invalid.
    """
    if folder.bundle.torchvision:
        return torchvision_source.labels(folder.bundle.torchvision)
    if folder.has_labels or isinstance(handler, LabelledHandler):
        return folder.labels()
    return None
