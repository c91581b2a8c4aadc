"""Make a model folder and its archive from a TorchScript file, for `make add-model`.

A TorchScript file does not declare what it takes, so the file is run on trial inputs. The results and the assumptions
are reported.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bundle import paths
from bundle.build import trial
from bundle.build.archive import archive
from bundle.build.export import load_torchscript
from bundle.build.inspect_classifier import inspect_digits, inspect_images, inspect_sounds
from bundle.build.inspect_detector import inspect_detector
from bundle.build.inspect_model import Found, Report, describe, find_kind
from bundle.build.inspect_segmenter import inspect_segmenter
from bundle.build.inspect_text import inspect_texts
from bundle.build.new_model import KINDS, NewModel
from bundle.build.user_modules import adapt
from bundle.catalog import CONFIG_NAME, LABELS_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.labels import read_labels
from bundle.paths import relative
from handlers.core.explain import WITH_ACTIVATIONS

CONFIG = """\
# TorchServe's settings of this model
minWorkers: 1
maxWorkers: 2
batchSize: {batch_size}         # maximum number of requests in one batch
maxBatchDelay: 5     # ms that a batch waits for further requests; only with `patience: fixed`
responseTimeout: 60  # s; a worker that takes longer for a batch is killed
startupTimeout: 120  # s; a worker that takes longer to start is killed
jobQueueSize: 500    # maximum number of requests in the queue; further requests get 429
{device}
handler:             # read by handlers/{handler}.py
{settings}
  threads: 1         # workers x threads should not exceed the cores

bundle:              # read by `make`
  version: "1.0"
  handler: {handler}
{source}
"""
COMMENT = 19  # column of a setting's comment


@dataclass(frozen=True)
class Kind:
    """What add-model knows about a handler.

    Attributes:
        inspect: finds out what a model takes and returns.
        example: makes an input to try a model with.
        kept: whether this input becomes the folder's sample if the user gives none.
    """

    inspect: Callable[[torch.jit.ScriptModule, NewModel, list[str] | None, Report], Found]
    example: Callable[[], bytes]
    kept: bool = False


HANDLERS = {
    "image_topk": Kind(inspect_images, trial.picture),
    "mnist": Kind(inspect_digits, trial.picture),
    "audio_mfcc": Kind(inspect_sounds, trial.sound),
    "text": Kind(inspect_texts, trial.text),
    "detection": Kind(inspect_detector, trial.picture, kept=True),
    "segmentation": Kind(inspect_segmenter, trial.picture, kept=True),
}


def add_model(
    new: NewModel,
    store: Path,
    models_dir: Path | None = None,
    report: Report = print,
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
    names = read_labels(new.labels) if new.labels else None
    serialized = load_torchscript(new.serialized)
    quantised = "quantized::" in str(serialized.inlined_graph)
    report(f"{relative(new.serialized)}: {describe(serialized, new.serialized, quantised)}")
    handler = new.stated_handler or KINDS[find_kind(serialized, new, report)][0]
    if hasattr(serialized, WITH_ACTIVATIONS) and adapt(serialized, handler) is serialized:
        report(f"has the method {WITH_ACTIVATIONS}: explanations with grad_cam use it")
    found = HANDLERS[handler].inspect(serialized, new, names, report)
    names = labels_of(new, names, found.classes, report)

    # in the models folder, because a rename needs the same disk; one level deeper than folders are looked for
    with tempfile.TemporaryDirectory(prefix=".add-", dir=models_dir) as temporary:
        folder = ModelFolder(Path(temporary) / new.name)
        folder.path.mkdir()
        (folder.path / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
        shutil.copy(new.serialized, folder.path / "model.pt")
        for file in new.files:
            shutil.copy(file, folder.path)
        content = new.sample.read_bytes() if new.sample else HANDLERS[handler].example()
        sample = name_sample(new, handler)
        if sample:
            (folder.path / sample).write_bytes(content)

        def build(expect: str | None = None) -> Path:
            """Write the configuration, and build the archive."""
            lines = source_lines(found, sample, expect, new)
            (folder.path / CONFIG_NAME).write_text(configuration(handler, found, quantised, lines))
            return archive(ModelFolder(folder.path), Path(temporary) / ".store").path

        built = build()
        first = trial.try_out(built, content, report)
        if handler == "detection" and new.sample and first:
            report(f"the sample's first detection, {first}, becomes what `make serve` expects (bundle: expect:)")
            built = build(expect=first)
        folder.path.rename(models_dir / new.name)
        store.mkdir(parents=True, exist_ok=True)
        for file in built.parent.iterdir():
            shutil.move(file, store / file.name)
    report(f"made {relative(models_dir / new.name)} and {relative(store / built.name)}")
    return ModelFolder(models_dir / new.name)


def labels_of(new: NewModel, names: list[str] | None, classes: int | None, report: Report) -> list[str]:
    """Return the labels by class index: those of LABELS, or class_0, class_1, ...

    Raises:
        BundleError: the model has another number of classes.
    """
    if names is None:
        assert classes is not None, "each inspection requires labels, or finds the number of classes"
        report(f"there are no LABELS: the classes are called class_0 to class_{classes - 1}")
        return [f"class_{index}" for index in range(classes)]
    if classes not in (None, len(names)):
        assert new.labels is not None
        raise BundleError(f"The model has {classes} classes, but {relative(new.labels)} has {len(names)} labels.")
    return names


def name_sample(new: NewModel, handler: str) -> str | None:
    """Return the sample's name in the model's folder; None if it has none."""
    if new.sample:
        return f"sample{new.sample.suffix.lower()}"
    return "sample.png" if HANDLERS[handler].kept else None


# --- model-config.yaml -----------------------------------------------------------------------------------------------


def configuration(handler: str, found: Found, quantised: bool, source: str) -> str:
    """Return the content of model-config.yaml.

    Args:
        source: the lines of the section `bundle:` about the folder's files.
    """
    return CONFIG.format(
        handler=handler,
        batch_size=found.batch_size,
        device="deviceType: cpu      # quantised models run on the CPU only\n" if quantised else "",
        settings="\n".join(setting(name, *each) for name, each in found.settings.items()),
        source=source,
    )


def setting(name: str, value: object, comment: str) -> str:
    """Return a line of the section `handler:`."""
    line = f"  {name}: {value if isinstance(value, str) else json.dumps(value)}"
    return f"{line:<{COMMENT}}  # {comment}" if comment else line


def source_lines(found: Found, sample: str | None, expect: str | None, new: NewModel) -> str:
    """Return what the section `bundle:` says of the folder's files, as lines of model-config.yaml."""
    lines = [f"  sample: {sample}"] if sample else []
    if expect is not None:
        lines.append(f"  expect: {json.dumps(expect, ensure_ascii=False)}")
    if new.files:
        lines.append(f"  files: {json.dumps([file.name for file in new.files])}")
    lines += ["  serialized:", "    file: model.pt"]
    if found.images:
        lines += [
            f"    mean: {json.dumps(found.images.mean)}  # of pixels in [0, 1]",
            f"    std: {json.dumps(found.images.std)}",
        ]
    return "\n".join(lines)
