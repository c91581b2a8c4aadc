"""Where things are in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
HANDLERS = ROOT / "handlers"
MODEL_STORE = ROOT / "model_store"


def relative(path: Path) -> str:
    """The path as people in the project's folder write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
