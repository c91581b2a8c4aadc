"""What `make add-model` was asked to add: the options, and their checks that do not need the model."""

import re
from dataclasses import dataclass
from pathlib import Path

from bundle.catalog import LABELS_NAME, handlers
from bundle.errors import BundleError, UsageError
from bundle.paths import relative

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # what torch-model-archiver accepts
TOKENIZER = "tokenizer.json"
KINDS = {  # and their handlers, the default first
    "image": ("image_topk", "mnist"),
    "detection": ("detection",),
    "segmentation": ("segmentation",),
    "text": ("text",),
    "sound": ("audio_mfcc",),
}
FORMATS = ("torchvision", "yolo", "yolov5")


@dataclass(frozen=True)
class NewModel:
    """A user's TorchScript file, and what is known about it.

    Attributes:
        name: the name of the model and of its folder.
        serialized: the TorchScript file.
        labels: a file that `read_labels` reads; by default, the labels are class_0, class_1, ...
        handler: a file of `handlers/`, without ".py"; by default, that of `kind`.
        kind: one of `KINDS`; by default, found out from the model's outputs.
        format: of a detector's outputs, one of `FORMATS`; by default, found out from their shape.
        size: side of the model's square images, in pixels; by default, the first of those tried that the model takes.
        resize: an image's shorter side in pixels before a classifier cuts out the square, or a segmenter its tiles.
        mean, std: for normalising pixels in [0, 1], one number a channel; by default, the usual ones of the kind.
        sample: an input to try the model with, which becomes the folder's sample; by default, one is generated.
        files: further files that the handler needs (tokenizer.json for `text`).
    """

    name: str
    serialized: Path
    labels: Path | None = None
    handler: str | None = None
    kind: str | None = None
    format: str | None = None
    size: int | None = None
    resize: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    sample: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        return next((file for file in self.files if file.name == TOKENIZER), None)

    @property
    def stated_handler(self) -> str | None:
        """The handler that the options decide; None if the model's outputs have to."""
        if self.handler:
            return self.handler
        if self.kind:
            return KINDS[self.kind][0]
        if self.format:
            return "detection"
        return "text" if self.tokenizer else None

    def check(self, models_dir: Path) -> None:
        """Check everything that does not need the model.

        Raises:
            BundleError: an option is invalid, two contradict each other, or a file is missing.
        """
        check_name(self.name, models_dir)
        self.check_options()
        named = [self.serialized, *([self.labels] if self.labels else []), *self.files]
        for file in [*named, *([self.sample] if self.sample else [])]:
            if file.is_dir():
                raise UsageError(f"{relative(file)} is a folder. Name one file in it.")
            if not file.is_file():
                raise UsageError(f"There is no file {relative(file)}.")

    def check_options(self) -> None:
        """Check the kind, the handler and the format.

        Raises:
            BundleError: one is unknown, they contradict each other, or the handler's files are missing.
        """
        if self.kind and self.kind not in KINDS:
            raise UsageError(f"There is no kind {self.kind!r}; there are: {', '.join(KINDS)}.")
        if self.format and self.format not in FORMATS:
            raise UsageError(f"There is no format {self.format!r}; there are: {', '.join(FORMATS)}.")
        if self.handler:
            check_handler(self.handler)
        if self.kind and self.handler and self.handler not in KINDS[self.kind]:
            raise UsageError(f"HANDLER={self.handler} does not serve KIND={self.kind}. Leave out one of the two.")
        if self.format and self.stated_handler != "detection":
            raise UsageError("FORMAT is the format of a detector's outputs. Leave it out, or set KIND=detection.")
        if self.stated_handler == "text" and not self.tokenizer:
            raise BundleError(
                f"A text classifier needs its {TOKENIZER}. Set FILES=path/to/{TOKENIZER}; a tokenizer of the package "
                f'transformers writes it with tokenizer.backend_tokenizer.save("{TOKENIZER}")'
            )


def check_name(name: str, models_dir: Path) -> None:
    """Check the name of a new model.

    Raises:
        BundleError: the name is invalid, or is that of an existing folder.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"Invalid model name {name!r}. Use letters, digits, '_', '-' and '.', starting with a letter or a digit."
        )
    if (models_dir / name).exists():
        raise BundleError(f"{relative(models_dir / name)} exists already. Remove it, or choose another NAME.")


def check_handler(handler: str) -> None:
    """Check that the handler exists, and that add-model knows its inputs.

    Raises:
        BundleError: it does not.
    """
    if handler not in handlers():
        raise UsageError(f"There is no handler {handler!r}; there are: {', '.join(handlers())}.")
    known = [name for names in KINDS.values() for name in names]
    if handler not in known:
        raise BundleError(
            f"add-model supports the handlers {', '.join(known)}, not {handler}. Make the folder by hand: "
            f"model-config.yaml with `bundle: {{handler: {handler}, serialized: {{file: model.pt}}}}`, model.pt and "
            f"{LABELS_NAME}."
        )
