"""`make add-model`: a TorchScript file with its labels -> a folder in `models/`, and its archive.

What a TorchScript file does not say of itself is found out by trying. What was found, and what was assumed, is
reported.
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

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # the archiver's rule
CONFIG = """\
# TorchServe's own settings of this model
minWorkers: 1
maxWorkers: 2
batchSize: 8         # at most so many requests in one batch
maxBatchDelay: 5     # ms a batch waits to fill; a lone request waits it out, so no more than an inference takes
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
    """What a user says of a TorchScript file.

    Attributes:
        name: the model's name, and the folder's.
        serialized: the TorchScript file.
        labels: a JSON list of labels, or an object {"0": label, ...}.
        handler: a file of `handlers/`, without ".py".
        size: side of the model's square image in pixels; by default, the first of `SIDES` that it takes.
        resize: an image's shorter side in pixels before the square is cut out; by default, see `usual_resize`.
        mean: what images are normalised with, in [0, 1], one number a channel; by default, as `NORMALISATIONS` says.
        std: likewise.
        sample: a file to try the model with, which becomes the folder's sample; by default, one is made up.
        files: what else the handler needs (tokenizer.json for `text`).
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
        """Check what can be checked before the model is loaded.

        Raises:
            BundleError: the name or the handler cannot be used, or a file is missing.
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
    """Make `models/NAME/` and its archive, once the model has answered a request in this process.

    Args:
        store: the folder of the archive.
        models_dir: the folder of the model folder; by default, that of all model folders.
        report: receives, line by line, what was found.

    Raises:
        BundleError: why the file cannot be served so; nothing is left behind.
    """
    models_dir = models_dir or paths.models_dir()
    new.check(models_dir)
    names = read_labels(new.labels)
    model = load_torchscript(new.serialized)
    quantised = "quantized::" in str(model.inlined_graph)
    report(f"{relative(new.serialized)}: {describe(model, new.serialized, quantised)}")

    images, resize = None, new.resize
    if new.handler in NORMALISATIONS:
        images = find_images(model, new.handler, new.size, new.mean, new.std)
        resize = resize or usual_resize(images.side)
        for line in describe_images(images, new.handler, resize):
            report(line)
        model = PreprocessedImages(model, images.mean, images.std)
        # unlike each other, so that a batch normalisation left in training mode shows
        brightness = torch.tensor([1.0, 0.5, 0.1]).view(BATCH, 1, 1, 1)
        inputs = ((random_images(BATCH, images.channels, images.side) * brightness).byte(),)
    else:
        inputs = EXAMPLES[new.handler]()
    outputs = examine(model, inputs, report)
    if outputs.shape[1] != len(names):
        raise BundleError(
            f"The model answers {outputs.shape[1]} classes, and {relative(new.labels)} has {len(names)} labels."
        )
    kind = kind_of(outputs, report)

    # on the disk where it will stay, and one level deeper than anybody looks for models
    with tempfile.TemporaryDirectory(prefix=".add-", dir=models_dir) as temporary:
        folder = ModelFolder(Path(temporary) / new.name)
        folder.path.mkdir()
        config = CONFIG.format(
            handler=new.handler,
            device="deviceType: cpu      # for a quantised model there is no other\n" if quantised else "",
            settings=settings_lines(new.handler, images, resize),
            outputs=kind,
            source=source_lines(images, new.sample_name, new.files),
        )
        (folder.path / CONFIG_NAME).write_text(config)
        (folder.path / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
        shutil.copy(new.serialized, folder.path / "model.pt")
        for file in new.files:
            shutil.copy(file, folder.path)
        if new.sample:
            shutil.copy(new.sample, folder.path / new.sample_name)
        built = archive(folder, Path(temporary) / ".store").path
        try_out(built, new.sample.read_bytes() if new.sample else made_up(new.handler), report)
        folder.path.rename(models_dir / new.name)
        store.mkdir(parents=True, exist_ok=True)
        for file in built.parent.iterdir():
            shutil.move(file, store / file.name)
    report(f"{relative(models_dir / new.name)} and {relative(store / built.name)} are there")
    return ModelFolder(models_dir / new.name)


def check_name(name: str, models_dir: Path) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid name for a model. Use letters, digits, '_', '-' and '.', and begin with a "
            "letter or a digit."
        )
    if (models_dir / name).exists():
        raise BundleError(f"The name {name} is taken: there is {relative(models_dir / name)}. Choose another NAME.")


def check_handler(handler: str, files: Sequence[Path]) -> None:
    if handler not in handlers():
        raise UsageError(f"There is no handler {handler!r}; there are: {', '.join(handlers())}.")
    known = [*NORMALISATIONS, *EXAMPLES]
    if handler not in known:
        raise BundleError(
            f"add-model can try files with {', '.join(known)}, not with {handler}. Make the folder by hand: "
            f"model-config.yaml with `bundle: {{handler: {handler}, serialized: {{file: model.pt}}}}`, model.pt and "
            f"{LABELS_NAME}."
        )
    if handler == "text" and "tokenizer.json" not in [file.name for file in files]:
        raise BundleError("The handler text needs the model's tokenizer.json. Give it: FILES=path/to/tokenizer.json")


# --- saying so -----------------------------------------------------------------------------------------------------


def describe_images(images: Images, handler: str, resize: int) -> list[str]:
    colour = {3: "RGB", 1: "grey"}[images.channels]
    takes = f"takes {colour} images of {images.side} x {images.side} pixels"
    if images.any_side and handler != "mnist":
        takes += "; it runs on others, too: give the SIZE it was trained with, if that is another"
    lines = [takes]
    if handler != "mnist":
        lines.append(f"an image's shorter side becomes {resize} pixels, and the middle is cut out (RESIZE)")
    numbers = f"mean {numbers_of(images.mean)}, std {numbers_of(images.std)}"
    return [*lines, f"normalised with {numbers} of pixels in [0, 1] ({images.origin}; MEAN, STD)"]


def settings_lines(handler: str, images: Images | None, resize: int | None) -> str:
    if handler != "image_topk":
        return "  top_k: 3"
    return "\n".join(
        [
            "  top_k: 5",
            f"  resize: {resize:<11}# pixels of the shorter side",
            f"  crop: {images.side:<13}# pixels of the square out of the middle",
            "  interpolation: bilinear",
            f"  channels: {images.channels:<9}# 3: RGB, 1: grey",
        ]
    )


def source_lines(images: Images | None, sample: str | None, files: Sequence[Path]) -> str:
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


# --- trying it -----------------------------------------------------------------------------------------------------


def try_out(mar: Path, content: bytes, report: Callable[[str], object]) -> None:
    """Sends one input through the archive's handler.

    Raises:
        BundleError: it does not load, or does not answer 200.
    """
    try:
        with DryRun(mar) as dry_run:
            [(status, body)] = dry_run.predict([{"body": content}])
    except Exception as exc:  # of the stranger's code, or of his files
        raise BundleError(f"The handler cannot load the model: {type(exc).__name__}.", str(exc)) from exc
    if status != 200:
        message = body["message"] if isinstance(body, dict) else body
        raise BundleError(f"The handler answers {status} to the input that the model was tried with: {message}")
    if "top_k" in body:
        body = ", ".join(f"{entry['label']} {entry['probability']:.2f}" for entry in body["top_k"])
    report(f"tried, it answers: {body}")


def made_up(handler: str) -> bytes:
    """An input of the handler's modality, as a file's content."""
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
