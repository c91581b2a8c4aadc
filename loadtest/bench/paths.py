"""Where the benchmark finds and keeps its files."""

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
WORK = ROOT / "build" / "bench"  # all that the benchmark makes
# of the inputs and of the model of the photographs
INGREDIENTS = (
    "loadtest/bench/inputs.py",
    "loadtest/bench/resnet.py",
    "models/mnist/make_sample.py",
    "models/audio/sample.wav",
)


@functools.cache
def made() -> Path:
    """Return the folder of the inputs and of the model of the photographs. Each version of their ingredients has its
    own.
    """
    contents = b"".join((ROOT / file).read_bytes() for file in INGREDIENTS)
    return WORK / f"made-{hashlib.sha256(contents).hexdigest()[:8]}"
