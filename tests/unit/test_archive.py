"""Archives: they are complete and reproducible, and they are rebuilt only if an input changed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bundle import mar
from bundle.build.archive import archive
from bundle.catalog import ModelFolder, select
from bundle.errors import BundleError
from bundle.paths import HANDLER_REQUIREMENTS, HANDLERS, MODELS, ROOT
from bundle.signing import check, make_keys
from handlers.core.declared import METADATA_NAME
from handlers.core.predictions import REFERENCE_NAME
from tests.shipped import SHIPPED


@pytest.fixture
def folder(tmp_path) -> ModelFolder:
    """Return a copy of the MNIST folder, which a test may change."""
    copy = tmp_path / "models" / "mnist"
    shutil.copytree(MODELS / "mnist", copy)
    return ModelFolder(copy)


def contents(archive: Path) -> dict[str, bytes]:
    return dict(mar.contents(archive))


@pytest.mark.parametrize("model", ["mnist", *(pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED[1:])])
def test_archive_of_each_model_is_self_contained(model, tmp_path):
    [source] = select([model])
    found = contents(archive(source, store=tmp_path).path)
    core = {f"handlers/core/{file.name}" for file in (HANDLERS / "core").glob("*.py")}
    expected = {"model.pt", "index_to_name.json", "model-config.yaml", "requirements.txt", mar.MANIFEST}
    expected |= {"MAR-INF/SHA256SUMS", "openapi.json", METADATA_NAME, REFERENCE_NAME}
    expected |= core | {"handlers/__init__.py", f"{source.bundle.handler}.py", *source.bundle.files}
    assert set(found) == expected
    manifest = json.loads(found[mar.MANIFEST])["model"]
    assert manifest["modelVersion"] == source.bundle.version
    assert manifest["handler"] == f"{source.bundle.handler}.py"
    assert manifest["configFile"] == "model-config.yaml"
    assert manifest["requirementsFile"] == "requirements.txt"
    assert list(json.loads(found["index_to_name.json"]).values()) == source.labels()


@pytest.mark.slow
def test_archive_built_twice_has_the_same_content(folder, tmp_path):
    first = contents(archive(folder, store=tmp_path / "one").path)
    second = contents(archive(folder, store=tmp_path / "two").path)
    for found in (first, second):
        del found["MAR-INF/SHA256SUMS"]  # it covers the manifest, which contains the build time
    manifests = [json.loads(found.pop(mar.MANIFEST)) for found in (first, second)]
    for manifest in manifests:
        del manifest["createdOn"]
    assert manifests[0] == manifests[1]
    assert first == second


@pytest.mark.slow
def test_archive_is_rebuilt_only_if_an_input_changed(folder, tmp_path):
    store = tmp_path / "store"
    assert archive(folder, store=store).rebuilt
    assert not archive(folder, store=store).rebuilt
    (folder.path / "metrics.json").write_text("{}")
    (folder.path / "train.py").touch()
    assert not archive(folder, store=store).rebuilt, "an archive does not depend on the training"
    forced = archive(folder, store=store, force=True)
    assert (forced.rebuilt, forced.notes) == (True, [])
    config = folder.path / "model-config.yaml"
    config.write_text(re.sub(r"maxBatchDelay: \d+", "maxBatchDelay: 77", config.read_text()))
    built = archive(ModelFolder(folder.path), store=store)
    assert (built.rebuilt, built.notes) == (True, ["changed since its last build: mnist/model-config.yaml"])
    (store / "mnist.mar").unlink()
    assert archive(ModelFolder(folder.path), store=store).rebuilt
    (store / "mnist.fingerprint").write_text("0123abcd")  # of an earlier bundle
    built = archive(ModelFolder(folder.path), store=store)
    assert (built.rebuilt, built.notes) == (True, [])


@pytest.mark.slow
def test_archive_with_the_reference_of_other_weights_has_a_note(folder, tmp_path):
    """As after a training."""
    assert archive(folder, store=tmp_path).notes == []
    weights = load_file(folder.weights_file)
    first = next(iter(weights))
    save_file(weights | {first: weights[first] * 1.01}, folder.weights_file)
    changed, outdated = archive(folder, store=tmp_path).notes
    assert changed == "changed since its last build: mnist/weights.safetensors"
    assert outdated.startswith("its reference.json was recorded with other weights, ")


@pytest.mark.slow
def test_archive_is_rebuilt_for_another_signing_key(folder, tmp_path, monkeypatch):
    """Without a key, an archive that is already signed is kept."""
    store = tmp_path / "store"
    trusted = {name: make_keys(tmp_path / name) for name in ("one", "other")}
    archive(folder, store=store)
    for name, public in trusted.items():
        monkeypatch.setenv("SIGNING_KEY", str(tmp_path / name))
        assert archive(folder, store=store).rebuilt
        assert not archive(folder, store=store).rebuilt
        check(store / "mnist.mar", public)
    monkeypatch.delenv("SIGNING_KEY")
    assert not archive(folder, store=store).rebuilt
    check(store / "mnist.mar", trusted["other"])


def test_current_archive_is_found_without_torch(folder, tmp_path):
    """Importing torch would take `make serve` seconds."""
    archive(folder, store=tmp_path)
    lines = ("import sys", "from pathlib import Path", "from bundle.build.archive import archive")
    lines += ("from bundle.catalog import ModelFolder",)
    lines += (f"print(archive(ModelFolder(Path({str(folder.path)!r})), Path({str(tmp_path)!r})).rebuilt)",)
    command = [sys.executable, "-c", "\n".join((*lines, "print('torch' in sys.modules)"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr


IN_A_CHANGED_CHECKOUT = """
import json, sys
from pathlib import Path
from bundle.build.archive import fingerprint
from bundle.catalog import select
import bundle.build.contents
import models.mnist.model

[folder], root = select(["mnist"]), Path.cwd()
ours = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
files = [file for file in ours if file.is_relative_to(root) and file.stat().st_size]
files += [root / name for name in json.loads(sys.argv[1])]
before, decides = fingerprint(folder), {}
for file in files:
    content = file.read_bytes()
    file.write_bytes(content + b"\\n")
    decides[str(file.relative_to(root))] = fingerprint(folder) != before
    file.write_bytes(content)
assert fingerprint(folder) == before
print(json.dumps(decides))
"""
DATA = [
    "handlers/mnist.py",
    "handlers/requirements.txt",
    "models/mnist/index_to_name.json",
    "models/mnist/model-config.yaml",
    "models/mnist/weights.safetensors",
]
UNUSED = ["bundle/cli/app.py", "handlers/text.py", "models/mnist/metrics.json", "models/mnist/train.py"]


@pytest.mark.slow
def test_fingerprint_changes_with_each_input_and_nothing_else(tmp_path):
    """The inputs are the modules that the build imports, the files that it copies, and the model's data."""
    for name in ("bundle", "handlers", "models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    core = [f"handlers/core/{file.name}" for file in (HANDLERS / "core").glob("*.py")]
    command = [sys.executable, "-c", IN_A_CHANGED_CHECKOUT, json.dumps(DATA + core + UNUSED)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    decides = json.loads(run.stdout)
    assert {"bundle/build/archive.py", "bundle/build/export.py", "bundle/catalog.py", "models/weights.py"} <= set(
        decides
    )
    assert [file for file, does in decides.items() if does == (file in UNUSED)] == []


def test_failed_build_keeps_the_old_archive(folder, tmp_path):
    store = tmp_path / "store"
    old = archive(folder, store=store).path.read_bytes()
    for labels, message in (('{"0": "zero", "2": "two"}', 'must have the keys "0" to "1"'), ('["a", "b"]', "2 labels")):
        (folder.path / "index_to_name.json").write_text(labels)
        with pytest.raises(BundleError, match=message):
            archive(ModelFolder(folder.path), store=store)
    assert (store / "mnist.mar").read_bytes() == old
    assert sorted(file.name for file in store.iterdir()) == ["mnist.fingerprint", "mnist.mar"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"handler: mnist": "handler: nonesuch"}, "there is no handler handlers/nonesuch.py"),
        ({'version: "1.0"': "version: one/two"}, "bundle: version"),
        ({"sample: sample.png": "smaple: sample.png"}, "smaple"),
        ({"bundle: ": "bundle: ["}, "not valid YAML"),
    ],
)
def test_archive_of_an_invalid_folder_is_rejected_with_the_reason(folder, tmp_path, change, message):
    config = folder.path / "model-config.yaml"
    text = config.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    with pytest.raises(BundleError, match=message):
        archive(ModelFolder(folder.path), store=tmp_path / "store")


def test_requirements_of_archives_are_the_locked_versions():
    pins = re.findall(r"^([a-z-]+)==(\S+)", HANDLER_REQUIREMENTS.read_text(), re.MULTILINE)
    locked = dict(
        re.findall(
            r"^([a-z-]+)==(\S+)",
            (ROOT / "requirements/serve.txt").read_text() + (ROOT / "requirements/torch.txt").read_text(),
            re.MULTILINE,
        )
    )
    assert len(pins) > 5
    assert {name: locked.get(name) for name, _ in pins} == dict(pins)
