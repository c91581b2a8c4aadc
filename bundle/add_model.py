"""`make add-model`: a TorchScript file with its labels -> a folder in `models/`, and its archive.

What a TorchScript file does not say of itself is found out by trying, and everything found or assumed is reported.
"""

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy
import soundfile
import torch
from PIL import Image
from torch import Tensor

from bundle.archive import MODEL_STORE, archive
from bundle.catalog import CONFIG_NAME, LABELS_NAME, MODELS, ModelFolder, handlers, read_labels, relative
from bundle.dryrun import DryRun
from bundle.errors import BundleError
from bundle.export import PreprocessedImages, load_torchscript, main_output, random_images

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # the archiver's rule

IMAGE_HANDLERS = ("image_topk", "mnist")
OTHER_HANDLERS = ("audio_mfcc", "text")  # their files take what the handler collates, and are served as they are

SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384, 512)  # pixels, in the order they are tried
MNIST_SIDE = 28
NORMALISATION = {  # (handler, channels) -> mean and std of pixels in [0, 1], and whose they are
    ("image_topk", 3): ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "ImageNet's"),
    ("image_topk", 1): ([0.5], [0.5], "to [-1, 1]"),
    ("mnist", 1): ([0.1307], [0.3081], "MNIST's"),
}

CONFIG = """\
# TorchServe's own settings of this model
minWorkers: 1
maxWorkers: 2
batchSize: 8         # at most so many requests in one batch
maxBatchDelay: 5     # ms a batch waits to fill; a lone request waits it out, so no more than an inference takes
responseTimeout: 60  # s; a worker that takes longer is killed
startupTimeout: 120  # s
jobQueueSize: 500    # requests that wait before further ones get 503

handler:             # read by handlers/{handler}.py
{settings}

bundle:              # read by `make`
  version: "1.0"
  handler: {handler}
{source}
"""


@dataclass(frozen=True)
class Images:
    """What an image classifier takes.

    Attributes:
        channels: 3 (RGB) or 1 (grey).
        side: pixels of the square.
        any_side: whether it runs on another side as well.
        mean, std: of pixels in [0, 1], one number a channel.
        origin: whose mean and std these are.
    """

    channels: int
    side: int
    any_side: bool
    mean: list[float]
    std: list[float]
    origin: str


@dataclass(frozen=True)
class Outputs:
    """What a classifier answers.

    Attributes:
        classes: how many.
        kind: "logits" or "probabilities", as the handlers' setting `outputs` has it.
        remarks: what the user should know.
    """

    classes: int
    kind: str
    remarks: list[str] = field(default_factory=list)


def add_model(
    name: str,
    serialized: Path,
    labels: Path,
    handler: str,
    size: int | None = None,
    resize: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    image: Path | None = None,
    files: Sequence[Path] = (),
    models_dir: Path = MODELS,
    store: Path = MODEL_STORE,
    report: Callable[[str], object] = print,
) -> ModelFolder:
    """Makes `models/NAME/` and its archive, after the model has answered a request in this process.

    Args:
        name: the model's name, and the folder's.
        serialized: the TorchScript file.
        labels: a JSON list of labels, or an object {"0": label, ...}.
        handler: a file of `handlers/`, without ".py".
        size: pixels of the model's square input; by default, the first of `SIDES` that it takes.
        resize: pixels of an image's shorter side before its middle is cut out; by default, 256 where `size` is 224
            and in the same proportion from 160 on, else `size`.
        mean, std: what images are normalised with, in [0, 1], one number a channel; by default, see `NORMALISATION`.
        image: a file to try the model with, which becomes the folder's sample; by default, one is made up.
        files: what else the handler needs (tokenizer.json for `text`).
        models_dir, store: where folder and archive go.
        report: is told line by line what was found.

    Raises:
        BundleError: it cannot be served so, and why; nothing is left behind.
    """
    check_name(name, models_dir)
    check_handler(handler, files)
    for file in (*files, *([image] if image else [])):
        if not file.is_file():
            raise BundleError(f"There is no file {relative(file)}.")
    names = read_labels(labels) if labels.is_file() else []
    if not names:
        raise BundleError(f"There is no file {relative(labels)}.")
    module = load_torchscript(serialized)
    report(f"{relative(serialized)}: TorchScript, {weight(serialized, module)}")

    # on the same disk as its place, and two levels deep, where nobody looks for models
    with tempfile.TemporaryDirectory(prefix=".add-", dir=models_dir) as temporary:
        folder = ModelFolder(Path(temporary) / name)
        folder.path.mkdir()
        shutil.copy(serialized, folder.path / "model.pt")
        settings, source = {"top_k": min(5, len(names))}, ["serialized:", "  file: model.pt"]
        if handler in IMAGE_HANDLERS:
            images = find_images(module, handler, size, mean, std)
            outputs = examine(lambda batch: module(normalise(images, batch)), image_batch(images), len(names))
