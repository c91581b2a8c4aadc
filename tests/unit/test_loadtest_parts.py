"""The load test's parts that need no locust: importing locust would patch the sockets of this process."""

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loadtest import answers, arrivals, plot, targets, thresholds
from loadtest.answers import Failure, WrongAnswer
from loadtest.errors import LoadTestError
from loadtest.record import Record, Tally
from loadtest.shapes import SHAPES, Load, levels
from loadtest.thresholds import Limits, ModelResult
from tests.shipped import SHIPPED

ROOT = Path(__file__).resolve().parents[2]


def write_model(folders: Path, name: str, **section: object) -> None:
    folder = folders / name
    folder.mkdir(parents=True)
    (folder / "sample.bin").write_bytes(name.encode())
    (folder / "model-config.yaml").write_text(yaml.safe_dump({"bundle": {"handler": "text", **section}}))


class TestTargets:
    def test_shipped_models_are_targets(self):
        found = {target.name: target for target in targets.choose()}
        assert found.keys() >= set(SHIPPED)
        assert found["mnist"].expect == "3"
        assert found["audio"].expect == "yes"  # the string, not a YAML boolean
        assert found["image"].sample.startswith(b"\xff\xd8")

    def test_new_folder_is_a_target_unless_served_on_request(self, tmp_path: Path):
        write_model(tmp_path, "birds", sample="sample.bin", expect=4)
        write_model(tmp_path, "bare")
        write_model(tmp_path, "large", sample="sample.bin", served="on request")
        assert [(t.name, t.sample, t.expect, t.user) for t in targets.choose("", tmp_path)] == [
            ("birds", b"birds", "4", "BirdsUser")
        ]
        assert [t.name for t in targets.choose("large", tmp_path)] == ["large"]

    def test_weight_of_a_model_is_read_and_defaults_to_one(self):
        assert [(t.name, t.weight) for t in targets.choose("mnist=4 text")] == [("mnist", 4), ("text", 1)]

    @pytest.mark.parametrize(
        ("choice", "message"),
        [("mnits", "no model 'mnits'"), ("mnist=0", "weight of mnist"), ("mnist=x", "'x'"), ("mnist=", "''")],
    )
    def test_invalid_choice_is_rejected(self, choice: str, message: str):
        with pytest.raises(LoadTestError, match=message):
            targets.choose(choice)

    def test_folder_without_a_readable_sample_is_rejected(self, tmp_path: Path):
        with pytest.raises(LoadTestError, match="has a sample"):
            targets.choose("", tmp_path)
        write_model(tmp_path, "birds", sample="gone.bin")
        with pytest.raises(LoadTestError, match="gone.bin"):
            targets.choose("", tmp_path)
        (tmp_path / "birds" / "model-config.yaml").write_text("a: [")
        with pytest.raises(LoadTestError, match="not valid YAML"):
            targets.choose("", tmp_path)


RANKING = '{"top_k": [{"label": "yes", "class": 0, "probability": 0.9}]}'


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "expect"),
        [
            (RANKING, "yes"),
            (RANKING, None),
            ('{"top_3_classes": [3, 9, 7], "top_3_probabilities": [0.9, 0.05, 0.01]}', "3"),
            ("[]", None),
        ],
    )
    def test_correct_answer_has_no_fault(self, text: str, expect: str | None):
        assert answers.fault(200, text, expect) is None

    @pytest.mark.parametrize(
        ("status", "text", "kind", "message"),
        [
            (200, RANKING, WrongAnswer, "yes instead of no"),
            (200, "", WrongAnswer, "not JSON"),
            (200, '{"top_k": []}', WrongAnswer, "no ranking"),
            (200, "[]", WrongAnswer, "no ranking"),
            (503, '{"code": 503, "type": "ServiceUnavailableException"}', Failure, "503 ServiceUnavailableException"),
            (502, "<html>", Failure, "502"),
            (0, None, Failure, "no answer: TimeoutError"),
        ],
    )
    def test_incorrect_answer_is_named(self, status: int, text: str | None, kind: type, message: str):
        fault = answers.fault(status, text, "no", TimeoutError())
        assert (type(fault), str(fault)) == (kind, message)


def users(load: Load) -> list[int]:
    """Return the number of users at each second of the run."""
    assert load.tick(load.seconds) is None
    return [load.tick(second)[0] for second in range(load.seconds)]


class TestShapes:
    def test_levels_double_up_to_the_number_of_users(self):
        assert levels(64, 4) == [4, 8, 16, 32, 64]
        assert levels(10, 1) == [1, 2, 5, 10]
        assert levels(3, 4) == [3]

    def test_steps_double_the_users(self):
        assert users(Load("steps", 8, 8, models=1)) == [1, 1, 2, 2, 4, 4, 8, 8]

    def test_spike_rises_tenfold_in_the_middle(self):
        assert users(Load("spike", 50, 10, models=4)) == [5] * 4 + [50] * 2 + [5] * 4
        assert min(users(Load("spike", 8, 10, models=4))) == 4

    def test_soak_ramps_up_for_at_most_a_minute(self):
        assert users(Load("soak", 20, 20))[:4] == [1, 10, 20, 20]
        assert users(Load("soak", 60, 3600))[58:62] == [58, 59, 60, 60]

    def test_rate_spreads_its_requests_over_the_users(self):
        load = Load.parse({"SHAPE": "rate", "RATE": "120", "USERS": "60", "DURATION": "5s"})
        assert (users(load), load.period) == ([60] * 5, 0.5)
        assert Load.parse({"SHAPE": "rate", "RATE": "120.5"}).users == 121  # as many as requests in a second
        assert Load.parse({"SHAPE": "rate", "RATE": "1"}, models=4).users == 4

    @given(
        shape=st.sampled_from(list(SHAPES)),
        most=st.integers(1, 500),
        seconds=st.integers(1, 7200),
        models=st.integers(1, 9),
        share=st.floats(0, 1, exclude_max=True),
    )
    def test_users_stay_between_one_and_the_maximum(self, shape, most, seconds, models, share):
        load = Load(shape, most, seconds, rate=1, models=models)
        assert 1 <= load.tick(share * seconds)[0] <= most

    def test_load_is_read_from_the_environment(self):
        assert Load.parse({}) is None
        assert Load.parse({"SHAPE": "steps"}, 4) == Load("steps", 64, 60, None, 4)
        assert Load.parse({"SHAPE": "soak", "DURATION": "1h30m5s"}).seconds == 5405

    @pytest.mark.parametrize(
        "setting",
        [
            {"SHAPE": "stairs"},
            {"USERS": "0"},
            {"USERS": "1.5"},
            {"DURATION": "0s"},
            {"DURATION": "5"},
            {"DURATION": "5x"},
        ]
        + [{"SHAPE": "rate", "RATE": rate} for rate in ("", "fast", "-1", "0", "nan", "inf", "200r/s")],
    )
    def test_invalid_environment_variable_is_rejected_by_name(self, setting: dict[str, str]):
        with pytest.raises(LoadTestError, match=f"^{list(setting)[-1]} is"):
            Load.parse({"SHAPE": "steps"} | setting)


class TestSchedule:
    def test_requests_are_due_at_equal_distances(self):
        schedule = arrivals.Schedule(2.0, now=100.0)
        first = schedule.wait(100.0)
        assert 0 <= first <= 2
        assert schedule.arrive(100 + first) == 0
        assert schedule.wait(100 + first) == pytest.approx(2)

    def test_late_user_catches_up_and_reports_its_delay(self):
        schedule = arrivals.Schedule(1.0, now=0.0)
        schedule.due = 10.0
        assert schedule.arrive(13.5) == 3.5
        assert schedule.wait(13.5) == 0
        assert schedule.arrive(13.5) == 2.5

    def test_schedules_start_at_different_times(self):
        assert len({arrivals.Schedule(1.0, 0.0).due for _ in range(20)}) == 20


def tally(times: dict[float, int], faults: int = 0, wrong: int = 0) -> Tally:
    made = Tally()
    for milliseconds, count in times.items():
        for _ in range(count):
            made.add(milliseconds)
    for _ in range(faults):
        made.add(1, "503")
    for _ in range(wrong):
        made.add(1, "no instead of yes", wrong=True)
    return made


class TestRecord:
    @given(st.lists(st.floats(0.02, 60_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
    def test_percentile_is_within_one_percent_of_the_exact_value(self, times: list[float], share: float):
        made = tally({time: times.count(time) for time in times})
        exact = sorted(times)[max(0, -int(-share * len(times) // 1) - 1)]
        assert 0.989 * exact <= made.percentile(share) <= exact * (1 + 1e-9)

    @pytest.mark.parametrize("p99", [1987, 1999.9, 2000])
    def test_rounding_misses_no_threshold(self, p99: float):
        outcome = ModelResult("mnist", tally({p99: 100}), 10)
        assert thresholds.misses(outcome, Limits(p99_ms=2000)) == []
        [missed] = thresholds.misses(outcome, Limits(p99_ms=1900))
        assert missed.startswith("p99 was 19")

    def test_failures_are_left_out_of_percentiles(self):
        made = tally({100: 10}, faults=90)
        assert made.percentile(0.5) == pytest.approx(100, rel=0.01)
        assert (made.requests, made.right, made.failed, made.wrong) == (100, 10, 90, 0)

    def test_reports_of_workers_are_added_up(self):
        one, other, together = Record(), Record(), Record()
        for second in range(4):
            one.add(second, "mnist", 10)
            other.add(second, "mnist", 20, "503")
        other.add(3, "text", 20, "b instead of a", wrong=True)
        for worker in (one, other):
            together.unpack(json.loads(json.dumps(worker.drain())))
        assert not one.tallies
        assert (together.of("mnist").right, together.of("mnist").failed, together.of("text").wrong) == (4, 4, 1)

    def test_points_leave_out_the_first_second_of_each_step(self, tmp_path: Path):
        record = record_of_a_run(steps=(1, 2, 4), seconds=5, rate=10)
        points = record.points("mnist")
        assert [(point.users, point.seconds, point.throughput) for point in points] == [
            (1, 4, 10),
            (2, 4, 20),
            (4, 4, 40),
        ]
        record.save(tmp_path / "record.json")
        assert Record.load(tmp_path / "record.json").points("mnist") == points

    def test_constant_load_is_split_into_points(self):
        assert len(record_of_a_run(steps=(4,), seconds=25, rate=1).points("mnist")) == 12


def record_of_a_run(steps: tuple[int, ...], seconds: int, rate: int) -> Record:
    """Return a record of `rate` correct answers per second and user of mnist, and one failure per second of text.

    Args:
        steps: number of users in each step.
        seconds: of each step.
    """
    record = Record()
    record.start(1000.0)
    for step, users in enumerate(steps):
        record.note_users(1000.0 + step * seconds, users)
        for second in range(1000 + step * seconds, 1000 + (step + 1) * seconds):
            record.add(second, "text", 1, "503")
            for number in range(rate * users):
                record.add(second + 0.5, "mnist", 10 + number)
    record.stopped = 1000.0 + len(steps) * seconds
    return record


class TestPlot:
    def test_plot_writes_points_and_charts(self, tmp_path: Path):
        table, png, svg = plot.write(record_of_a_run(steps=(1, 2, 4), seconds=5, rate=10), tmp_path / "run")
        rows = list(csv.DictReader(table.open()))
        assert [(row["model"], row["users"], row["throughput"], row["failed"]) for row in rows] == [
            *(("mnist", str(users), f"{10 * users}.00", "0") for users in (1, 2, 4)),
            *(("text", str(users), "0.00", "4") for users in (1, 2, 4)),
        ]
        assert rows[3]["p99_ms"] == ""
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in svg.read_text()

    def test_plot_of_an_empty_record_writes_points_only(self, tmp_path: Path):
        assert plot.write(Record(), tmp_path / "run") == [tmp_path / "run_points.csv"]


class TestThresholds:
    def test_shipped_thresholds_are_valid_for_another_models_folder(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("BUNDLE_MODELS", str(ROOT / "tests" / "models"))
        shipped = thresholds.read(thresholds.FILE, targets.known_models())
        assert shipped.of("price") == shipped.defaults

    def test_shipped_thresholds_are_valid_and_inherit_defaults(self):
        shipped = thresholds.read(thresholds.FILE, set(SHIPPED))
        assert shipped.of("mnist").wrong == 0  # a default
        assert shipped.of("mnist") != shipped.of("something else") == shipped.defaults

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("defaults: {p99: 5}", "unknown threshold 'p99'"),
            ("defaults: {p99_ms: fast}", "'fast', and must be a number"),
            ("defaults: {wrong: true}", "True, and must be a number"),
            ("defaults: {p99_ms: .nan}", "must be a number"),
            ("defaults: {failures: 5}", "a share from 0 to 1"),
            ("defaults: [1]", "not a mapping"),
            ("models: {mnits: {p99_ms: 5}}", "unknown model 'mnits'"),
            ("limits: {}", "unknown section 'limits'"),
            ("a: [", "not valid YAML"),
            ("text", "not a mapping"),
        ],
    )
    def test_invalid_thresholds_file_is_rejected(self, tmp_path: Path, text: str, message: str):
        file = tmp_path / "limits.yaml"
        file.write_text(text)
        with pytest.raises(LoadTestError, match=message):
            thresholds.read(file, set(SHIPPED))

    def test_missing_thresholds_file_is_rejected(self, tmp_path: Path):
        with pytest.raises(LoadTestError, match="cannot be read"):
            thresholds.read(tmp_path / "none.yaml", set(SHIPPED))

    @pytest.mark.parametrize(
        ("limits", "met", "missed"),
        [
            (Limits(), tally({1e6: 1}, faults=1000), tally({})),
            (Limits(p99_ms=100), tally({50: 99, 5000: 1}), tally({50: 98, 5000: 2})),
            (Limits(failures=0.1), tally({1: 9}, faults=1), tally({1: 8}, faults=2)),
            (Limits(failures=0.1, wrong=0), tally({1: 9}, faults=1), tally({1: 9}, wrong=1)),
            (Limits(throughput=5), tally({1: 50}), tally({1: 49}, faults=50)),
        ],
    )
    def test_each_limit_is_met_and_missed(self, limits: Limits, met: Tally, missed: Tally):
        assert thresholds.misses(ModelResult("m", met, 10), limits) == []
        assert len(thresholds.misses(ModelResult("m", missed, 10), limits)) == 1

    def test_arrival_rate_has_its_own_limit(self):
        limits = Limits(throughput=100, arrivals=0.95)
        assert thresholds.misses(ModelResult("m", tally({1: 100}), 10, due=100), limits) == []
        assert len(thresholds.misses(ModelResult("m", tally({1: 90}), 10, due=100), limits)) == 2


def test_image_has_every_module_that_the_load_test_imports(tmp_path: Path):
    """Each module of loadtest/ is imported with the files that docker/Dockerfile copies into the image, and no others.

    The commands of loadtest/cli.py and the benchmark run beside the bundle.
    """
    stage = (ROOT / "docker" / "Dockerfile").read_text().partition(" AS locust\n")[2]
    copied = [line.replace("/sources/", "").split()[1:-1] for line in stage.splitlines() if line.startswith("COPY ")]
    for name in (name for names in copied for name in names if name.split("/")[0] in ("bundle", "loadtest")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("bench", "__pycache__"))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    modules = {file.stem for file in (tmp_path / "loadtest").glob("*.py")} - {"__init__", "__main__", "cli"}
    assert {"locustfile", "report", "targets"} <= modules
    code = f"""
import importlib, sys
for name in {sorted(modules)}:
    importlib.import_module("loadtest." + name)
print(*(name for name in sys.modules if name.partition(".")[0] in ("bundle", "handlers", "torch", "ts")))
print(*(sys.modules[name].__file__ for name in ("bundle", "loadtest")))
"""
    # without site-packages' .pth files, which put this checkout on the path
    packages = sysconfig.get_path("purelib")
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": packages},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    imported, files = run.stdout.splitlines()[-2:]
    assert imported
    assert all(name.startswith("bundle") for name in imported.split())
    assert all(Path(file).is_relative_to(tmp_path) for file in files.split()), files


def test_run_without_a_server_ends_with_status_3():
    run = subprocess.run(
        [sys.executable, "-m", "loadtest", "run", "mnist", "--host", "http://127.0.0.1:9"],
        cwd=ROOT, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr == "error: No server answers at http://127.0.0.1:9. Start one: make serve\n"
