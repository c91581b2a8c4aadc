"""Make a model folder and its archive from a TorchScript file and its labels, for `make add-model`.

A TorchScript file does not declare what it takes, so the file is run on trial inputs. The results and the assumptions
are reported.
"""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import soundfile
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from bundle import paths
from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.build.export import PreprocessedImages, load_torchscript, random_images
from bundle.build.inspect_model import (
    BATCH,
    EXAMPLES,
    NORMALISATIONS,
    Images,
    describe,
    examine,
    find_images,
    kind_of,
    usual_resize,
)
from bundle.catalog import CONFIG_NAME, LABELS_NAME, ModelFolder, handlers, read_labels
from bundle.errors import BundleError, UsageError
from bundle.paths import relative
from bundle.samples import ranking

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # what torch-model-archiver accepts
CONFIG = """\
# TorchServe's own settings of this model
minWorkers: 1
maxWorkers: 2
batchSize: 8         # most requests in one batch
maxBatchDelay: 5     # ms that a batch waits to fill. A lone request waits this long: not more than an inference takes
responseTimeout: 60  # s; a worker that takes longer is killed
startupTimeout: 120  # s
jobQueueSize: 500    # requests that wait before further ones get 503
{device}
handler:             # read by handlers/{handler}.py
{settings}
  outputs: {outputs}
  threads: 1         # workers x threads should not exceed the cores

bundle:              # read by `make`
  version: "1.0"
  handler: {handler}
{source}
"""


@dataclass(frozen=True)
class NewModel:
    """A user's TorchScript file, and what is known about it.

    Attributes:
        name: the name of the model and of its folder.
        serialized: the TorchScript file.
        labels: a JSON file: a list of labels, or an object {"0": label, ...}.
        handler: a file of `handlers/`, without ".py".
        size: side of the model's square images, in pixels; by default, the first of `SIDES` that the model takes.
        resize: an image's shorter side in pixels before the square is cut out; by default, see `usual_resize`.
        mean, std: for normalising pixels in [0, 1], one number a channel; by default, those of `NORMALISATIONS`.
        sample: an input to try the model with, which becomes the folder's sample; by default, one is generated.
        files: further files that the handler needs (tokenizer.json for `text`).
    """

    name: str
    serialized: Path
    labels: Path
    handler: str = "image_topk"
    size: int | None = None
    resize: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    sample: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def sample_name(self) -> str | None:
        """The sample's name in the model's folder."""
        return f"sample{self.sample.suffix.lower()}" if self.sample else None

    def check(self, models_dir: Path) -> None:
        """Check everything that does not need the model.

        Raises:
            BundleError: the name or the handler is invalid, or a file is missing.
        """
        check_name(self.name, models_dir)
        check_handler(self.handler, self.files)
        for file in (self.serialized, self.labels, *self.files, *([self.sample] if self.sample else [])):
            if not file.is_file():
                raise UsageError(f"There is no file {relative(file)}.")


def add_model(
    new: NewModel,
    store: Path,
    models_dir: Path | None = None,
    report: Callable[[str], object] = print,
) -> ModelFolder:
    """Make a model folder and its archive, after the model has answered a request in this process.

    Args:
        store: the folder of the archive.
        models_dir: the folder of the model folder; by default, that of all model folders.
        report: receives what was found, line by line.

    Raises:
        BundleError: the file cannot be served like this; nothing is left behind.
    """
    models_dir = models_dir or paths.models_dir()
    new.check(models_dir)
    names = read_labels(new.labels)
    serialized = load_torchscript(new.serialized)
    quantised = "quantized::" in str(serialized.inlined_graph)
    report(f"{relative(new.serialized)}: {describe(serialized, new.serialized, quantised)}")

    model: nn.Module = serialized
    images = None
    settings = "  top_k: 3"
    if new.handler in NORMALISATIONS:
        images = find_images(serialized, new.handler, new.size, new.mean, new.std)
        resize = new.resize or usual_resize(images.side)
        for line in describe_images(images, new.handler, resize):
            report(line)
        model = PreprocessedImages(serialized, images.mean, images.std)
        # images that differ show a batch normalisation that was left in training mode
        brightness = torch.tensor([1.0, 0.5, 0.1]).view(BATCH, 1, 1, 1)
        inputs: tuple[Tensor, ...] = (
            (random_images(BATCH, images.channels, images.side, images.side) * brightness).byte(),
        )
        if new.handler == "image_topk":
            settings = image_settings(images, resize)
    else:
        inputs = EXAMPLES[new.handler]()
    outputs = examine(model, inputs, report)
    if outputs.shape[1] != len(names):
        raise BundleError(
            f"The model has {outputs.shape[1]} classes, but {relative(new.labels)} has {len(names)} labels."
        )
    kind = kind_of(outputs, report)

    # in the models folder, because a rename needs the same disk; one level deeper than folders are looked for
    with tempfile.TemporaryDirectory(prefix=".add-", dir=models_dir) as temporary:
        folder = ModelFolder(Path(temporary) / new.name)
        folder.path.mkdir()
        config = CONFIG.format(
            handler=new.handler,
            device="deviceType: cpu      # quantised models run on the CPU only\n" if quantised else "",
            settings=settings,
            outputs=kind,
            source=source_lines(images, new.sample_name, new.files),
        )
        (folder.path / CONFIG_NAME).write_text(config)
        (folder.path / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
        shutil.copy(new.serialized, folder.path / "model.pt")
        for file in new.files:
            shutil.copy(file, folder.path)
        if new.sample and new.sample_name:
            shutil.copy(new.sample, folder.path / new.sample_name)
        built = archive(folder, Path(temporary) / ".store").path
        try_out(built, new.sample.read_bytes() if new.sample else generated_input(new.handler), report)
        folder.path.rename(models_dir / new.name)
        store.mkdir(parents=True, exist_ok=True)
        for file in built.parent.iterdir():
            shutil.move(file, store / file.name)
    report(f"made {relative(models_dir / new.name)} and {relative(store / built.name)}")
    return ModelFolder(models_dir / new.name)


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
        raise BundleError(f"{relative(models_dir / name)} exists already. Choose another NAME.")


def check_handler(handler: str, files: Sequence[Path]) -> None:
    """Check that the handler exists, that add-model knows its inputs, and that its files are given.

    Raises:
        BundleError: it does not, or they are not.
    """
    if handler not in handlers():
        raise UsageError(f"There is no handler {handler!r}; there are: {', '.join(handlers())}.")
    known = [*NORMALISATIONS, *EXAMPLES]
    if handler not in known:
        raise BundleError(
            f"add-model supports the handlers {', '.join(known)}, not {handler}. Make the folder by hand: "
            f"model-config.yaml with `bundle: {{handler: {handler}, serialized: {{file: model.pt}}}}`, model.pt and "
            f"{LABELS_NAME}."
        )
    if handler == "text" and "tokenizer.json" not in [file.name for file in files]:
        raise BundleError("The handler text needs the model's tokenizer.json. Set FILES=path/to/tokenizer.json")


# --- descriptions --------------------------------------------------------------------------------------------------


def describe_images(images: Images, handler: str, resize: int) -> list[str]:
    """Return lines that say how the handler will make the model's images."""
    colour = {3: "RGB", 1: "grey"}[images.channels]
    size = f"takes {colour} images of {images.side} x {images.side} pixels"
    if images.any_side and handler != "mnist":
        size += "; it also runs on other sizes: set SIZE if it was trained on another one"
    lines = [size]
    if handler != "mnist":
        lines.append(f"images are resized to {resize} pixels on the shorter side (RESIZE), then cropped in the middle")
    numbers = f"mean {numbers_of(images.mean)}, std {numbers_of(images.std)}"
    return [*lines, f"pixels in [0, 1] are normalised with {numbers} ({images.origin}; MEAN and STD change them)"]


def image_settings(images: Images, resize: int) -> str:
    """Return the settings of `image_topk`, as lines of model-config.yaml."""
    return "\n".join(
        [
            "  top_k: 5",
            f"  resize: {resize:<11}# pixels of the shorter side",
            f"  crop: {images.side:<13}# pixels of the square that is cut out of the middle",
            "  interpolation: bilinear",
            f"  channels: {images.channels:<9}# 3: RGB, 1: grey",
        ]
    )


def source_lines(images: Images | None, sample: str | None, files: Sequence[Path]) -> str:
    """Return what the section `bundle:` says of the folder's files, as lines of model-config.yaml."""
    lines = [f"  sample: {sample}"] if sample else []
    if files:
        lines.append(f"  files: {json.dumps([file.name for file in files])}")
    lines += ["  serialized:", "    file: model.pt"]
    if images:
        lines += [
            f"    mean: {json.dumps(images.mean)}  # of pixels in [0, 1]",
            f"    std: {json.dumps(images.std)}",
        ]
    return "\n".join(lines)


def numbers_of(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# --- the dry run ---------------------------------------------------------------------------------------------------


def try_out(mar: Path, content: bytes, report: Callable[[str], object]) -> None:
    """Send one input through the archive's handler, and report the answer.

    Raises:
        BundleError: the handler does not load the model, or the status is not 200.
    """
    try:
        with DryRun(mar) as dry_run:
            [(status, body)] = dry_run.predict([{"body": content}])
    except Exception as exc:  # the user's model and files can raise anything
        raise BundleError(f"The handler cannot load the model: {type(exc).__name__}.", str(exc)) from exc
    if status != 200:
        message = body["message"] if isinstance(body, dict) else body
        raise BundleError(f"The handler answered {status} to the trial input: {message}")
    classes = ", ".join(f"{each.label} {each.probability:.2f}" for each in ranking(body))
    report(f"answers the trial input: {classes or body}")


def generated_input(handler: str) -> bytes:
    """Return an input of the kind that the handler takes, as the content of a file."""
    file = io.BytesIO()
    if handler in NORMALISATIONS:
        image = Image.new("RGB", (320, 240), (20, 30, 60))
        ImageDraw.Draw(image).ellipse((110, 40, 210, 200), outline=(240, 220, 180), width=24)
        image.save(file, "PNG")
    elif handler == "audio_mfcc":
        tone = 0.5 * numpy.sin(2 * numpy.pi * 440 / 16_000 * numpy.arange(16_000))
        soundfile.write(file, tone, 16_000, format="WAV")
    else:
        file.write(b"A text to try the model with.")
    return file.getvalue()
