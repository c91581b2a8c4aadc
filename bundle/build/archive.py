"""A model folder -> `model_store/NAME.mar`, built again only when something that goes into it has changed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import yaml

from bundle.build.export import export
from bundle.build.handler import handler_settings, labels
from bundle.build.precision import keep_what_is_right, set_precision
from bundle.catalog import CONFIG_NAME, LABELS_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import replacing
from bundle.paths import HANDLERS, MODEL_STORE, MODELS, ROOT
from bundle.signing import key_id, key_of, seal

BUILDERS = (ROOT / "bundle", ROOT / "bundle" / "build")  # folders of the modules that decide an archive's content
REQUIREMENTS = HANDLERS / "requirements.txt"


@dataclass(frozen=True)
class Archive:
    """A built archive.

    Attributes:
        notes: what building it showed, a line each.
    """

    path: Path
    rebuilt: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """What an archive is made of, laid out as a worker will see it: a TorchScript file, a model-config.yaml, and a
    folder of everything else.
    """

    module: Path
    config: Path
    extra: Path


def archive(folder: ModelFolder, store: Path = MODEL_STORE, force: bool = False) -> Archive:
    """Builds the folder's archive where it is missing or out of date, and signs it where $SIGNING_KEY names a key.

    Raises:
        BundleError: something that belongs into it is missing or wrong.
    """
    target = store / f"{folder.name}.mar"
    record = target.with_suffix(".fingerprint")
    key = key_of("SIGNING_KEY")
    wanted = fingerprint(folder), key_id(key)
    if not force and target.is_file() and is_current(record, *wanted):
        return Archive(target, rebuilt=False)
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"archive-{folder.name}-") as temporary:
        stage = gather(folder, Path(temporary) / "stage")
        notes = []
        if folder.bundle.examples:
            in_float32 = replace(stage, config=Path(temporary) / CONFIG_NAME)
            shutil.copy(stage.config, in_float32.config)
            set_precision(in_float32.config, "float32")
            plain = pack(folder, in_float32, Path(temporary))
            notes = keep_what_is_right(folder, plain, stage.module, stage.extra, stage.config)
        built = pack(folder, stage, Path(temporary))
        seal(built, key)
        with replacing(target) as partial:
            shutil.move(built, partial)
    record.write_text(" ".join(filter(None, wanted)))
    return Archive(target, True, notes)


def is_current(record: Path, content: str, signer: str) -> bool:
    """Whether an archive was built of this content, and signed with this key. Who has no key (signer "") keeps what
    others have signed.
    """
    recorded = record.read_text().split(" ") if record.is_file() else []
    return recorded[:1] == [content] and (not signer or recorded[1:] == [signer])


def gather(folder: ModelFolder, target: Path) -> Stage:
    """Puts everything that the archive carries into the folder `target`."""
    stage = Stage(target / "model.pt", target / CONFIG_NAME, target / "extra")
    export(folder, stage.module)
    shutil.copytree(HANDLERS / "core", stage.extra / "handlers" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HANDLERS / "__init__.py", stage.extra / "handlers")
    stage_config(folder, stage.config)
    for file in folder.extra_files:
        shutil.copy(file, stage.extra)
    if names := labels(folder):
        (stage.extra / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
    return stage


def stage_config(folder: ModelFolder, target: Path) -> None:
    """The folder's model-config.yaml; for a torchvision model, with the geometry of its weights' own images."""
    if folder.bundle.torchvision:
        target.write_text(yaml.safe_dump(folder.config | {"handler": handler_settings(folder)}, sort_keys=False))
    else:
        shutil.copy(folder.path / CONFIG_NAME, target)


def pack(folder: ModelFolder, stage: Stage, temporary: Path) -> Path:
    """Runs torch-model-archiver over `stage`, and returns the archive."""
    handler = shutil.copy(folder.handler_file, temporary)
    requirements = shutil.copy(REQUIREMENTS, temporary / "requirements.txt")
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--force"]
    options = {
        "--model-name": folder.name,
        "--version": folder.bundle.version,
        "--serialized-file": stage.module,
        "--handler": handler,
        "--extra-files": stage.extra,
        "--config-file": stage.config,
        "--requirements-file": requirements,
        "--export-path": temporary,
    }
    for option, value in options.items():
        command += [option, str(value)]
    # the archiver gathers in a folder of TMPDIR named after the model: a TMPDIR of its own, or two builds would mix
    scratch = temporary / "scratch"
    scratch.mkdir(exist_ok=True)
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(scratch)})
    built = temporary / f"{folder.name}.mar"
    if run.returncode or not built.is_file():
        raise BundleError(f"torch-model-archiver failed for {folder.name}.", run.stdout + run.stderr)
    return built


def fingerprint(folder: ModelFolder) -> str:
    """A digest of all that decides what is in the archive: the folder, the handlers, the code that builds it."""
    not_archived = {"train.py", "make_sample.py", "README.md", folder.bundle.sample}
    not_archived |= {"metrics.json", "tuning.json", "tuning.svg"}
    inputs = [folder.handler_file, REQUIREMENTS, HANDLERS / "__init__.py", *(HANDLERS / "core").glob("*.py")]
    inputs += [file for file in folder.path.rglob("*") if file.is_file() and file.name not in not_archived]
    inputs += [file for builder in BUILDERS for file in builder.glob("*.py")]
    inputs.append(MODELS / "weights.py")
    digest = hashlib.sha256()
    for file in sorted(file for file in inputs if "__pycache__" not in file.parts):
        name = file.relative_to(folder.path if file.is_relative_to(folder.path) else ROOT)  # folders may move
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    for package in ("torch", "torchvision", "torchaudio", "torch-model-archiver"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
