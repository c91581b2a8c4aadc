"""Archives: complete, the same whenever they are built, and built only when they must be."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bundle import mar
from bundle.build.archive import REQUIREMENTS, archive, fingerprint
from bundle.catalog import ModelFolder, select
from bundle.errors import BundleError
from bundle.paths import HANDLERS, MODELS, ROOT
from bundle.signing import check, make_keys


@pytest.fixture
def folder(tmp_path) -> ModelFolder:
    """A copy of the MNIST folder, to be changed."""
    copy = tmp_path / "models" / "mnist"
    shutil.copytree(MODELS / "mnist", copy)
    return ModelFolder(copy)


def contents(archive: Path) -> dict[str, bytes]:
    return dict(mar.contents(archive))


@pytest.mark.parametrize("model", ["mnist", "image", "audio", "text"])
def test_an_archive_is_self_contained(model, tmp_path):
    [source] = select([model])
    found = contents(archive(source, store=tmp_path).path)
    core = {f"handlers/core/{file.name}" for file in (HANDLERS / "core").glob("*.py")}
    expected = {"model.pt", "index_to_name.json", "model-config.yaml", "requirements.txt", mar.MANIFEST}
    expected.add("MAR-INF/SHA256SUMS")
    expected |= core | {"handlers/__init__.py", f"{source.bundle.handler}.py", *source.bundle.files}
    assert set(found) == expected
    manifest = json.loads(found[mar.MANIFEST])["model"]
    assert manifest["modelVersion"] == source.bundle.version
    assert manifest["handler"] == f"{source.bundle.handler}.py"
    assert manifest["configFile"] == "model-config.yaml"
    assert manifest["requirementsFile"] == "requirements.txt"
    assert list(json.loads(found["index_to_name.json"]).values()) == source.labels()


def test_the_same_input_gives_the_same_content(folder, tmp_path):
    first = contents(archive(folder, store=tmp_path / "one").path)
    second = contents(archive(folder, store=tmp_path / "two").path)
    for found in (first, second):
        del found["MAR-INF/SHA256SUMS"]  # of the MANIFEST.json, too, which has its time of birth
    manifests = [json.loads(found.pop(mar.MANIFEST)) for found in (first, second)]
    for manifest in manifests:
        del manifest["createdOn"]
    assert manifests[0] == manifests[1]
    assert first == second


def test_it_is_built_again_only_when_an_input_changes(folder, tmp_path):
    store = tmp_path / "store"
    assert archive(folder, store=store).rebuilt
    assert not archive(folder, store=store).rebuilt
    (folder.path / "metrics.json").write_text("{}")
    (folder.path / "train.py").touch()
    assert not archive(folder, store=store).rebuilt, "training is no input of an archive"
    assert archive(folder, store=store, force=True).rebuilt
    config = folder.path / "model-config.yaml"
    config.write_text(re.sub(r"maxBatchDelay: \d+", "maxBatchDelay: 77", config.read_text()))
    assert archive(ModelFolder(folder.path), store=store).rebuilt
    (store / "mnist.mar").unlink()
    assert archive(ModelFolder(folder.path), store=store).rebuilt


def test_it_is_built_again_for_another_signer(folder, tmp_path, monkeypatch):
    """And who has no key keeps what others have signed."""
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


@pytest.mark.parametrize("file", ["weights.safetensors", "index_to_name.json", "model-config.yaml", "model.py"])
def test_every_input_decides(folder, file):
    before = fingerprint(folder)
    with (folder.path / file).open("ab") as changed:
        changed.write(b"\n")
    assert fingerprint(ModelFolder(folder.path)) != before


def test_a_failure_leaves_the_old_archive(folder, tmp_path):
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
        ({'version: "1.0"': "version: one"}, "bundle: version"),
        ({"sample: sample.png": "smaple: sample.png"}, "smaple"),
        ({"bundle: ": "bundle: ["}, "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path, change, message):
    config = folder.path / "model-config.yaml"
    text = config.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    with pytest.raises(BundleError, match=message):
        archive(ModelFolder(folder.path), store=tmp_path / "store")


def test_the_archives_requirements_are_those_that_are_locked():
    pins = re.findall(r"^([a-z-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    locked = dict(
        re.findall(
            r"^([a-z-]+)==(\S+)",
            (ROOT / "requirements/serve.txt").read_text() + (ROOT / "requirements/torch.txt").read_text(),
            re.MULTILINE,
        )
    )
    assert len(pins) > 5
    assert {name: locked.get(name) for name, _ in pins} == dict(pins)
