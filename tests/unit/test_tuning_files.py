"""The files of `make tune`: settings, inputs, archives, reports."""

import json
import math
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import mar
from bundle.catalog import ModelFolder
from bundle.errors import BundleError
from bundle.load.generator import LoadResult
from bundle.paths import MODELS
from bundle.tuning import report, search, session
from bundle.tuning import trial_server as measure
from bundle.tuning import tuner as tune
from bundle.tuning import yaml_edit as config_file
from bundle.tuning.search import Arrivals, Point
from bundle.tuning.space import Candidate
from tests.shipped import SHIPPED

NOW = Candidate(1, 1, 16, 5)
TARGET = 0.1


def load(throughput: float, p99: float) -> LoadResult:
    return LoadResult(1.0, int(throughput), 0, throughput, p99 / 2, p99, p99, p99)


# --- model-config.yaml ----------------------------------------------------------------------------------------------

WANTED = {("minWorkers",): 2, ("batchSize",): 128, ("maxBatchDelay",): 10, ("handler", "threads"): 2}


@pytest.mark.parametrize("name", [*SHIPPED, "imagenet"])
def test_edit_changes_only_the_values(name: str):
    old = (MODELS / name / "model-config.yaml").read_text()
    new = config_file.edited(old, WANTED)
    expected = yaml.safe_load(old)
    expected |= {"minWorkers": 2, "batchSize": 128, "maxBatchDelay": 10}
    expected["handler"]["threads"] = 2
    assert yaml.safe_load(new) == expected
    changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=True) if a != b]
    assert len(changed) <= len(WANTED)
    for before, after in changed:
        assert before.partition("#")[1:] == after.partition("#")[1:]
        assert before.find("#") == after.find("#")  # comments keep their column
    assert config_file.edited(new, WANTED) == new


def test_edit_adds_missing_keys():
    old = "# mine\nbatchSize: 4  # few\n\nbundle:\n  handler: mnist\n"
    new = config_file.edited(old, {("minWorkers",): 2, ("handler", "precision"): "bfloat16"})
    assert new == f"# mine\nminWorkers: 2\n{old[7:]}\nhandler:\n  precision: bfloat16\n"
    threads = {("handler", "threads"): 2}
    assert config_file.edited("handler:\n  top_k: 1\n", threads) == "handler:\n  threads: 2\n  top_k: 1\n"
    assert config_file.edited("handler: {top_k: 1}\n", threads) == "handler: {threads: 2, top_k: 1}\n"
    assert config_file.edited("handler: {}\n", threads) == "handler: {threads: 2}\n"
    assert config_file.edited("handler:\nbundle: {}\n", threads) == "handler:\n  threads: 2\nbundle: {}\n"


keys = st.sampled_from(["minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "jobQueueSize", "note"])
values = st.one_of(st.integers(0, 2000), st.booleans(), st.text(max_size=20), st.lists(st.integers(), max_size=3))


@settings(max_examples=50)
@given(
    config=st.dictionaries(keys, values, min_size=1),
    handler=st.one_of(st.none(), st.dictionaries(st.sampled_from(["threads", "top_k", "precision"]), values)),
    flow=st.sampled_from([None, False]),
    width=st.sampled_from([20, 120]),
)
def test_edit_is_correct_or_rejected(config: dict, handler: dict | None, flow: bool | None, width: int):
    text = yaml.safe_dump(config | {"handler": handler}, default_flow_style=flow, width=width, sort_keys=False)
    expected = config | {"minWorkers": 2, "batchSize": 128, "maxBatchDelay": 10}
    expected["handler"] = (handler or {}) | {"threads": 2}
    try:
        new = config_file.edited(text, WANTED)
    except BundleError:
        return  # nothing is written then; the test of the shipped files shows that theirs are never rejected
    assert yaml.safe_load(new) == expected


def test_edit_of_unsupported_yaml_is_rejected():
    with pytest.raises(BundleError, match="must be a mapping"):
        config_file.edited("- a\n", WANTED)
    shared = "other: &it\n  threads: 1\nhandler: *it\n"
    with pytest.raises(BundleError, match="Set by hand: .*handler.threads: 2"):
        config_file.edited(shared, WANTED)


def test_patch_is_applied_by_git(tmp_path: Path):
    file = tmp_path / "models" / "mnist" / "model-config.yaml"
    file.parent.mkdir(parents=True)
    old = (MODELS / "mnist" / "model-config.yaml").read_text()
    file.write_text(old)
    new = config_file.edited(old, WANTED)
    (tmp_path / "p.patch").write_text(config_file.difference(old, new, "models/mnist/model-config.yaml"))
    subprocess.run(["git", "apply", "p.patch"], cwd=tmp_path, check=True)
    assert file.read_text() == new


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    shutil.copytree(MODELS / "mnist", tmp_path / "mnist", ignore=shutil.ignore_patterns("tuning.*"))
    return ModelFolder(tmp_path / "mnist")


def test_changes_are_the_settings_that_differ(folder: ModelFolder):
    (folder.path / "model-config.yaml").write_text(
        "minWorkers: 1\nmaxWorkers: 2\nbatchSize: 32\nmaxBatchDelay: 2\nhandler:\n  threads: 1\n"
    )
    now = tune.current_settings(folder)
    assert now == Candidate(1, 1, 32, 2, "auto")
    assert session.changes(folder, now, replace(now, batch_size=64, workers=2)) == {
        ("minWorkers",): 2,
        ("batchSize",): 64,
    }
    many = session.changes(folder, now, replace(now, workers=4, precision="float32"))
    assert many == {("minWorkers",): 4, ("maxWorkers",): 4, ("handler", "precision"): "float32"}
    assert session.changes(folder, now, now) == {}


def test_changed_workers_set_minimum_and_maximum(folder: ModelFolder):
    (folder.path / "model-config.yaml").write_text("bundle:\n  handler: mnist\n")
    now = tune.current_settings(folder)
    assert now == Candidate(1, 1, 1, 100, "auto")
    wanted = session.changes(folder, now, replace(now, workers=2))
    assert wanted == {("minWorkers",): 2, ("maxWorkers",): 2}


def test_patch_leaves_the_folder_unchanged(folder: ModelFolder, tmp_path: Path):
    before = {file: file.read_bytes() for file in folder.path.iterdir() if file.is_file()}
    session.write_down(folder, {"model": "mnist"}, b"<svg/>", {("batchSize",): 63}, tmp_path / "m.patch")
    assert {file: file.read_bytes() for file in folder.path.iterdir() if file.is_file()} == before
    assert "+batchSize: 63 " in (tmp_path / "m.patch").read_text()
    assert json.loads((tmp_path / "m.json").read_text()) == {"model": "mnist"}
    assert (tmp_path / "m.svg").read_bytes() == b"<svg/>"


def test_variant_of_an_archive_has_the_candidates_settings(tmp_path: Path):
    archive, target = tmp_path / "m.mar", tmp_path / "v.mar"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(mar.MANIFEST, json.dumps({"model": {"configFile": "c.yaml"}}))
        file.writestr("c.yaml", "batchSize: 1\njobQueueSize: 7\nhandler: {top_k: 3, cache_entries: 50}\n")
        file.writestr("model.pt", b"weights")
    measure.variant(archive, target, Candidate(2, 1, 8, 5), "float32")
    assert mar.config(target) == {
        "batchSize": 8,
        "jobQueueSize": 7,
        # no cache: its answers would count as the model's
        "handler": {"top_k": 3, "cache_entries": 0, "threads": 1, "precision": "float32"},
        "minWorkers": 2,
        "maxWorkers": 2,
        "maxBatchDelay": 5,
    }
    assert mar.read(target, "model.pt") == b"weights"


def archived(tmp_path: Path, precision: str, *files: str) -> Path:
    """An archive whose model-config.yaml has this precision."""
    archive = tmp_path / "settled.mar"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(mar.MANIFEST, json.dumps({"model": {"configFile": "c.yaml"}}))
        file.writestr("c.yaml", f"handler: {{precision: {precision}}}\n")
        for name in files:
            file.writestr(name, b"")
    return archive


def test_precision_that_the_archive_excludes_is_rejected(folder: ModelFolder, tmp_path: Path):
    settled = archived(tmp_path, "[float32, int8]", "model.int8.pt")
    tune.check_precisions(["auto", "float32", "int8"], "auto", folder, settled)
    with pytest.raises(BundleError, match="in bfloat16 on its examples. Choose among: float32, int8"):
        tune.check_precisions(["float32", "bfloat16"], "auto", folder, settled)
    unsettled = archived(tmp_path, "auto")
    tune.check_precisions(["auto", "bfloat16", "float16"], "auto", folder, unsettled)
    with pytest.raises(BundleError, match="no int8 module"):
        tune.check_precisions(["int8"], "auto", folder, unsettled)


def test_list_of_precisions_is_kept(folder: ModelFolder):
    (folder.path / "model-config.yaml").write_text("batchSize: 2\nhandler: {precision: [float32, int8]}\n")
    now = tune.current_settings(folder)
    assert now.precision == "float32 or int8"
    assert session.changes(folder, now, replace(now, batch_size=4)) == {("batchSize",): 4}


def test_joined_loads_count_every_input_alike():
    fast, slow = load(400, 0.02), load(100, 0.08)
    joined = measure.joined([fast, slow])
    assert joined.throughput == pytest.approx(160)  # a second of each: 2 / (1/400 + 1/100)
    assert joined.p99 == 0.08
    assert joined.answered == 500


def test_largest_batch_depends_on_the_size_of_answers():
    assert measure.largest_batch(16 * 2**20, 1024) == 8192
    assert measure.largest_batch(16 * 2**20, 15 * 2**20) == 1


def test_missing_inputs_are_rejected(folder: ModelFolder, tmp_path: Path):
    with pytest.raises(BundleError, match="There is no file"):
        tune.read_inputs(folder, [tmp_path / "none.png"])
    (tmp_path / "a.json").write_text("{}")
    [sent] = tune.read_inputs(folder, [tmp_path / "a.json"])
    assert sent.headers == {"Content-Type": "application/json"}
    unsampled = ModelFolder(MODELS / "imagenet")
    with pytest.raises(BundleError, match="imagenet has no sample. Name a file to send: --input"):
        tune.read_inputs(unsampled, [])


def test_report_is_json_with_every_measurement():
    lost = Point(NOW, "round 1", 4, LoadResult(1.0, 0, 3, 0.0, *(math.inf,) * 4))
    other = replace(NOW, batch_size=32)
    final = {NOW: [{1: load(100, 0.02)}], other: [{1: load(121, 0.02)}]}
    verdict = search.decide(final, {}, NOW, TARGET)
    measured = report.measured([lost, Point(NOW, search.FINAL, 1, load(5, 0.02))], {NOW: "died"}, {NOW: "bfloat16"})
    steady = {other: Arrivals(1, load(84, 0.03))}
    found = json.loads(json.dumps(report.outcome(NOW, verdict, steady) | measured, allow_nan=False))
    assert found["replaces"] is True
    assert [each["throughput"] for each in found["final"]] == [121, 100]
    assert found["final"][0]["at_70%"]["p99_ms"] == 30
    assert found["final"][1]["at_70%"] is None
    first, second = found["measurements"]
    assert (first["p99_ms"], first["failed"]) == (None, 3)
    assert (second["p99_ms"], second["computed_in"]) == (20, "bfloat16")
    assert found["not_servable"][0]["error"] == "died"


class WithoutResult(tune.Tuning):
    """A search in which the current settings miss the target, and the others cannot be served."""

    def field(self):
        return []

    def judge(self, *_):
        return {}

    def finals(self, _):
        self.final = {NOW: [{1: load(5, 9.0)}]}
        self.points = [Point(NOW, search.FINAL, 1, load(5, 9.0))]
        self.broken = {replace(NOW, batch_size=32): "died"}


def test_search_without_a_result_names_what_could_not_be_served():
    with pytest.raises(BundleError, match=r"p99 target of 100 ms\. Closest: 9000\.0 ms at 5\.0 answers/s") as raised:
        WithoutResult(None, NOW, ["auto"], True, TARGET, 60, print).run()
    assert raised.value.details == f"could not be served: {replace(NOW, batch_size=32)}: died"


@pytest.mark.parametrize(
    ("stage", "seconds", "is_finalist", "busy"),
    [
        ("round 1", 0.05, True, True),
        ("round 1", 0.05, False, False),  # its server died in the final
        ("round 1", 9.0, True, False),
        (search.FINAL, 0.05, True, False),  # in one of its turns
    ],
)
def test_machine_may_have_been_busy_only_if_a_finalist_met_the_target_before(
    stage: str, seconds: float, is_finalist: bool, busy: bool
):
    searched = WithoutResult(None, NOW, ["auto"], True, TARGET, 60, print)
    searched.points = [Point(NOW, stage, 1, load(5, seconds))]
    searched.final = {NOW: []} if is_finalist else {}
    assert ("the machine may have been busy" in searched.nearest()) == busy


def test_chart_is_small_and_reproducible():
    chart = pytest.importorskip("bundle.tuning.chart")
    other = replace(NOW, batch_size=32)
    points = [
        Point(candidate, "round 1", concurrency, load(100 * factor * concurrency, 0.01 * concurrency))
        for candidate, factor in ((NOW, 1), (other, 1.3))
        for concurrency in (1, 4, 16)
    ]
    first, second = (chart.draw("mnist", points, NOW, other, TARGET, ("svg",))["svg"] for _ in range(2))
    assert first == second
    assert len(first) < 60_000
    assert b"target: 100 ms" in first
    assert f"best: {other}".encode() in first
