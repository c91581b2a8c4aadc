"""Collect what an archive contains, and pack it with torch-model-archiver."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from ts.torch_handler.base_handler import BaseHandler

from bundle import mar
from bundle.build import reference
from bundle.build.export import export
from bundle.build.handler import handler_settings, labels, load_handler
from bundle.build.model_api import ModelAPI, answer_of
from bundle.build.precision import drop_inaccurate_precisions, examples, set_precision
from bundle.catalog import CONFIG_NAME, LABELS_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.openapi import NAME as OPENAPI_NAME
from bundle.paths import HANDLER_REQUIREMENTS, HANDLERS
from handlers.core.batch import BatchHandler
from handlers.core.declared import METADATA_NAME, metadata
from handlers.core.labelled import LabelledHandler
from handlers.core.predictions import REFERENCE_NAME


@dataclass(frozen=True)
class Stage:
    """The parts of an archive, before they are packed.

    Attributes:
        module: the TorchScript file.
        config: the model-config.yaml.
        extra: the folder of everything else, as a worker will see it.
        notes: what was found out about them, a line each.
    """

    module: Path
    config: Path
    extra: Path
    notes: list[str] = field(default_factory=list)


def build(folder: ModelFolder, temporary: Path) -> tuple[Path, list[str]]:
    """Build the folder's archive in the folder `temporary`; return it, and what the build found out, a line each.

    Raises:
        BundleError: a part of the archive is missing or invalid.
    """
    handler = load_handler(folder)
    stage = gather(folder, handler, temporary / "stage")
    notes = [*stage.notes]
    if folder.bundle.examples:
        in_float32 = replace(stage, config=temporary / CONFIG_NAME)
        shutil.copy(stage.config, in_float32.config)
        set_precision(in_float32.config, "float32")
        plain = pack(folder, in_float32, temporary)
        notes += drop_inaccurate_precisions(folder, plain, stage.module, stage.extra, stage.config)
        notes += record_reference(folder, plain, stage.extra)
    packed = pack(folder, stage, temporary)
    if isinstance(handler, BatchHandler):
        notes += describe_api(folder, handler, packed)
    return packed, notes


def record_reference(folder: ModelFolder, archive: Path, extra: Path) -> list[str]:
    """Record what the archive's model predicts for the folder's examples, unless the folder has a reference.json.

    Returns:
        a note, if it cannot be recorded.
    """
    target = extra / REFERENCE_NAME
    if target.exists():
        return []
    try:
        files = map(reference.from_file, examples(folder))
        target.write_text(reference.text(reference.record(archive, list(files), "the folder's examples")))
    except BundleError as exc:
        return [f"no reference of its predictions. {exc}"]
    return []


def describe_api(folder: ModelFolder, handler: BatchHandler, packed: Path) -> list[str]:
    """Add the model's OpenAPI document to its archive, with the answer to the folder's sample as an example.

    Returns:
        a note, if the example is missing because the model does not answer.

    Raises:
        BundleError: the answer is not of the type that the handler declares.
    """
    api, answer, notes = ModelAPI(folder, handler), None, []
    if folder.bundle.sample:
        try:
            answer = answer_of(packed, folder)
        except BundleError as exc:
            notes = [f"{OPENAPI_NAME} has no example of an answer. {exc}"]
        else:
            api.check_answer(answer)
    mar.append(packed, OPENAPI_NAME, json.dumps(api.document(answer), ensure_ascii=False).encode())
    return notes


def gather(folder: ModelFolder, handler: BaseHandler | None, target: Path) -> Stage:
    """Collect the parts of the folder's archive in the folder `target`."""
    stage = Stage(target / "model.pt", target / CONFIG_NAME, target / "extra")
    export(folder, handler, stage.module)
    shutil.copytree(HANDLERS / "core", stage.extra / "handlers" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HANDLERS / "__init__.py", stage.extra / "handlers")
    stage_config(folder, stage.config)
    for file in folder.extra_files:
        if file.name == OPENAPI_NAME:
            raise BundleError(f"{folder.name}: bundle: files: has {file.name}, which each archive has. Rename it.")
        shutil.copy(file, stage.extra)
    if isinstance(handler, BatchHandler):
        (stage.extra / METADATA_NAME).write_text(json.dumps(metadata(handler), indent=1))
    if names := labels(folder, handler):
        (stage.extra / LABELS_NAME).write_text(json.dumps(dict(enumerate(names)), indent=1, ensure_ascii=False))
        recorded = folder.path / REFERENCE_NAME
        if recorded.is_file() and isinstance(handler, LabelledHandler):
            stage.notes.extend(reference.outdated(folder, reference.check(recorded, handler, names)))
            shutil.copy(recorded, stage.extra)
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
    requirements = shutil.copy(HANDLER_REQUIREMENTS, temporary / "requirements.txt")
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
