"""The benchmark's folders."""

import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
WORK = ROOT / "build" / "bench"  # everything that the benchmark writes
GENERATED_FROM = (
    "loadtest/bench/inputs.py",
    "loadtest/bench/resnet.py",
    "models/mnist/make_sample.py",
    "models/audio/sample.wav",
    "models/cells/sample.jpg",
    "models/membrane/sample.png",
    "models/molecule/sample.json",
)


@functools.cache
def generated() -> Path:
    """Return the folder of the generated inputs and of the generated model for photographs.

    Its name depends on the files that they are generated from, so that a change of these generates them again.
    """
    contents = b"".join((ROOT / file).read_bytes() for file in GENERATED_FROM)
    return WORK / f"made-{hashlib.sha256(contents).hexdigest()[:8]}"
