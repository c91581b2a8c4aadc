"""Where things are: in the repository, and in a models folder of the user's own."""

import os
from pathlib import Path

from bundle.errors import BundleError

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"  # the repository's own, with the code that model.py files share
HANDLERS = ROOT / "handlers"
MODEL_STORE = ROOT / "model_store"


def models_dir() -> Path:
    """Return the folder of the model folders: the one that BUNDLE_MODELS names, else the repository's.

    The environment is read at each call. A relative path starts at the current folder.

    Raises:
        BundleError: there is no such folder.
    """
    named = os.environ.get("BUNDLE_MODELS")
    if not named:
        return MODELS
    folder = Path(named).resolve()
    if not folder.is_dir():
        raise BundleError(f"BUNDLE_MODELS is {named!r}, and there is no such folder. Make it, or name another.")
    return folder


def relative(path: Path) -> str:
    """Return the path as people in the project's folder write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
