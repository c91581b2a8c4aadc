"""The paths of the repository, and of the user's own models folder."""

import os
from pathlib import Path

from bundle.errors import BundleError

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"  # the repository's own; it also has the code that its model.py files share
HANDLERS = ROOT / "handlers"
HANDLER_REQUIREMENTS = HANDLERS / "requirements.txt"  # what a worker needs
MODEL_STORE = ROOT / "model_store"
FRONTEND = ROOT / "bundle" / "frontend"  # the Java agent: sources and jar
FRONTEND_JAR = FRONTEND / "frontend.jar"


def models_dir() -> Path:
    """Return the folder of the model folders: the one that BUNDLE_MODELS names, or the repository's.

    The environment is read at each call. A relative path is resolved from the current folder.

    Raises:
        BundleError: the folder does not exist.
    """
    named = os.environ.get("BUNDLE_MODELS")
    if not named:
        return MODELS
    folder = Path(named).resolve()
    if not folder.is_dir():
        raise BundleError(f"BUNDLE_MODELS is {named!r}, and there is no such folder. Make it, or set another one.")
    return folder


def relative(path: Path) -> str:
    """Return the path as a string, relative to the repository if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
