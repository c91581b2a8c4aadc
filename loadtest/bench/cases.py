"""What is measured: five inputs, each with the model that answers it and the numbers of clients that ask.

The inputs are drawn by `inputs.py`; no file of a data set is among them.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "bench"  # all that the benchmark makes
INGREDIENTS = [
    ROOT / file
    for file in (
        "loadtest/bench/inputs.py",
        "loadtest/bench/resnet.py",
        "models/mnist/make_sample.py",
        "models/audio/sample.wav",
    )
]
# inputs and the model of the photographs: a change of what they are made of is a folder of its own
MADE = WORK / f"made-{hashlib.sha256(b''.join(file.read_bytes() for file in INGREDIENTS)).hexdigest()[:8]}"


@dataclass(frozen=True)
class Case:
    """One input, sent again and again.

    Attributes:
        model: the folder of the model that answers it; several cases may share one.
        concurrencies: numbers of clients that ask at the same time.
    """

    name: str
    model: str
    file: str
    content_type: str
    concurrencies: tuple[int, ...]

    @cached_property
    def body(self) -> bytes:
        """The input as a file has it. It is drawn the first time it is asked for, and kept."""
        from loadtest.bench.inputs import made  # imports NumPy and Pillow, which a list of the cases does not need

        return made(self.file).read_bytes()

    @property
    def folder(self) -> Path:
        """The model's folder: one of the project's, or one that the benchmark makes."""
        shipped = ROOT / "models" / self.model
        return shipped if shipped.is_dir() else MADE / "models" / self.model


CASES = {
    case.name: case
    for case in (
        Case("mnist", "mnist", "digit.png", "image/png", (1, 16, 64, 256, 1024)),
        Case("photo", "resnet18", "photo.jpg", "image/jpeg", (1, 4, 16, 64)),
        Case("photo-12mp", "resnet18", "photo-12mp.jpg", "image/jpeg", (1, 4, 16)),
        Case("audio", "audio", "word.wav", "audio/wav", (1, 16, 64, 256)),
        Case("text", "text", "sentence.txt", "text/plain", (1, 16, 64, 256, 1024)),
    )
}
