"""Build a model folder's archive, NAME.mar, if it is missing or out of date."""

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
from bundle.build.handler import handler_settings, labels, load_handler
from bundle.build.precision import drop_inaccurate_precisions, set_precision
from bundle.catalog import CONFIG_NAME, LABELS_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import replacing
from bundle.paths import HANDLERS, MODEL_STORE, MODELS, ROOT
from bundle.signing import key_id, key_of, seal

BUILDERS = (ROOT / "bundle", ROOT / "bundle" / "build")  # their modules decide what an archive contains
NOT_ARCHIVED = {"train.py", "make_sample.py", "README.md", "metrics.json", "tuning.json", "tuning.svg"}
REQUIREMENTS = HANDLERS / "requirements.txt"


@dataclass(frozen=True)
class Archive:
    """A built archive.

    Attributes:
        rebuilt: whether it was out of date or missing.
        notes: what the build found out, a line each.
    """

    path: Path
    rebuilt: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """The parts of an archive, before they are packed.

    Attributes:
        module: the TorchScript file.
        config: the model-config.yaml.
        extra: the folder of everything else, as a worker will see it.
    """

    module: Path
    config: Path
    extra: Path


def archive(folder: ModelFolder, store: Path = MODEL_STORE, force: bool = False) -> Archive:
    """Build the folder's archive if it is missing or out of date, and sign it if SIGNING_KEY names a key.

    Args:
        store: the folder of the archive.
        force: build an archive that is up to date, too.

    Raises:
        BundleError: a part of the archive is missing or invalid. An existing archive stays as it is.
    """
    target = store / f"{folder.name}.mar"
    record = target.with_suffix(".fingerprint")
    key = key_of("SIGNING_KEY")
    content, signer = fingerprint(folder), key_id(key)
    if not force and target.is_file() and is_current(record, content, signer):
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
            notes = drop_inaccurate_precisions(folder, plain, stage.module, stage.extra, stage.config)
        built = pack(folder, stage, Path(temporary))
        seal(built, key)
        with replacing(target) as partial:
            shutil.move(built, partial)
    record.write_text(f"{content} {signer}".rstrip())
    return Archive(target, True, notes)


def is_current(record: Path, content: str, signer: str) -> bool:
    """Return whether an archive was built of this content and signed with this key.

    Args:
        record: the file beside the archive that says so.
        content: of `fingerprint`.
        signer: of `key_id`. Without a key (""), a signed archive is current, too: building it again would lose the
            signature.
    """
    recorded = record.read_text().split(" ") if record.is_file() else []
    return recorded[:1] == [content] and (not signer or recorded[1:] == [signer])


def gather(folder: ModelFolder, target: Path) -> Stage:
    """Collect the parts of the folder's archive in the folder `target`."""
    stage = Stage(target / "model.pt", target / CONFIG_NAME, target / "extra")
    handler = load_handler(folder)
    export(folder, handler, stage.module)
    shutil.copytree(HANDLERS / "core", stage.extra / "handlers" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HANDLERS / "__init__.py", stage.extra / "handlers")
    stage_config(folder, stage.config)
    for file in folder.extra_files:
        shutil.copy(file, stage.extra)
    if names := labels(folder, handler):
        (stage.extra / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
    return stage


def stage_config(folder: ModelFolder, target: Path) -> None:
    """Write the archive's model-config.yaml: for a torchvision model, with the image sizes of its weights."""
    if folder.bundle.torchvision:
        target.write_text(yaml.safe_dump(folder.config | {"handler": handler_settings(folder)}, sort_keys=False))
    else:
        shutil.copy(folder.path / CONFIG_NAME, target)


def pack(folder: ModelFolder, stage: Stage, temporary: Path) -> Path:
    """Run torch-model-archiver, and return the archive that it writes into the folder `temporary`."""
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
    # the archiver works in a folder of TMPDIR that is named after the model: two builds must not share a TMPDIR
    scratch = temporary / "scratch"
    scratch.mkdir(exist_ok=True)
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(scratch)})
    built = temporary / f"{folder.name}.mar"
    if run.returncode or not built.is_file():
        raise BundleError(f"torch-model-archiver failed for {folder.name}.", run.stdout + run.stderr)
    return built


def fingerprint(folder: ModelFolder) -> str:
    """Return a digest of everything that decides the archive's content: the folder, the handlers, the build's code."""
    ours = [REQUIREMENTS, HANDLERS / "__init__.py", *(HANDLERS / "core").glob("*.py"), MODELS / "weights.py"]
    ours += [file for builder in BUILDERS for file in builder.glob("*.py")]
    not_archived = NOT_ARCHIVED | {folder.bundle.sample}
    own = [file for file in folder.path.rglob("*") if file.is_file() and file.name not in not_archived]
    inputs = [(str(file.relative_to(ROOT)), file) for file in ours]
    # relative to the folder, because the digest must be the same wherever the folder lies
    inputs += [(str(file.relative_to(folder.path)), file) for file in own if "__pycache__" not in file.parts]
    # listed files may lie outside of the folder, and have one of the names that are not archived otherwise
    inputs += [(folder.bundle.handler, folder.handler_file), *zip(folder.bundle.files, folder.extra_files, strict=True)]
    digest = hashlib.sha256()
    for name, file in sorted(inputs):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for package in ("torch", "torchvision", "torchaudio", "torch-model-archiver"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
