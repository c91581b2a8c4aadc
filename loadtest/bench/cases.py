"""What is measured: five inputs, each with the model that answers it and the numbers of clients that ask.

The inputs are drawn by `inputs.py`; no file of a data set is among them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loadtest.bench import paths


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
        from loadtest.bench.inputs import made  # NumPy and Pillow take a second, and a list of the cases needs neither

        return made(self.file).read_bytes()

    @property
    def folder(self) -> Path:
        """The model's folder: one of the project's, or one that the benchmark makes."""
        shipped = paths.MODELS / self.model
        return shipped if shipped.is_dir() else paths.made() / "models" / self.model


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
