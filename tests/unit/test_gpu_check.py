"""The parts of `make gpu-check` that need no GPU: its runner, its record, and how it compares answers."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
from PIL import Image

from tests.programs import run
from tests.support import wait_for
from tests.trials.gpu import compare
from tests.trials.gpu.__main__ import app, visible
from tests.trials.gpu.record import END, Checks, Record, Result
from tests.trials.gpu.runner import Step, run_steps
from tests.trials.gpu.steps import MODELS, STEPS

pytestmark = pytest.mark.slow  # most tests start processes

TITLES = {"one": "The first", "two": "The second"}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "cpu", TITLES)


def step(name: str, code: str, limit: float = 60) -> Step:
    return Step(name, TITLES[name], (sys.executable, "-c", code), limit)


def counting(file: Path) -> str:
    """Return code that adds a line to a file."""
    return f"open({str(file)!r}, 'a').write('x')"


def test_step_that_passed_is_skipped_and_one_that_failed_runs_again(record: Record, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    failing = [step("one", counting(first)), step("two", f"{counting(second)}; raise SystemExit('no such card')")]
    assert not run_steps(failing, record, 60)
    assert not run_steps(failing, record, 60)
    assert (first.read_text(), second.read_text()) == ("x", "xx")
    assert run_steps([step("one", counting(first)), step("two", counting(second))], record, 60)
    assert (first.read_text(), second.read_text()) == ("x", "xxx")


def test_step_that_fails_does_not_stop_the_next_and_its_cause_is_reported(record: Record, tmp_path: Path):
    assert not run_steps([step("one", "1 / 0"), step("two", counting(tmp_path / "second"))], record, 60)
    assert (tmp_path / "second").exists()
    report = (record.folder / "report.md").read_text()
    assert "ZeroDivisionError" in report
    assert "| The first | **failed** |" in report
    assert "| The second | passed |" in report


def test_step_beyond_its_limit_is_interrupted_and_may_clean_up(record: Record, tmp_path: Path):
    code = "import time\ntry: time.sleep(60)\nfinally: " + counting(tmp_path / "cleaned")
    start = time.monotonic()
    assert not run_steps([step("one", code, limit=8)], record, 60)
    assert time.monotonic() - start < 30
    assert (tmp_path / "cleaned").exists()
    assert "timed out after 8 s" in (record.folder / "report.md").read_text()


def test_server_that_a_killed_step_left_is_ended(record: Record, tmp_path: Path):
    server = "import os, subprocess, sys; os.environ['RUN_DIR'] = {!r}; ".format(str(record.folder / "run"))
    server += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); "
    run_steps(
        [step("one", server + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); os._exit(1)")], record, 60
    )
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_steps_after_the_time_is_up_are_not_run(record: Record, tmp_path: Path):
    assert not run_steps([step("one", counting(tmp_path / "first"))], record, 1)
    assert not (tmp_path / "first").exists()
    assert "the time was up" in (record.folder / "report.md").read_text()


def test_failed_check_fails_its_step_and_is_repeated_alone(record: Record):
    calls: list[str] = []

    def check(name: str, error: Exception | None = None) -> dict:
        calls.append(name)
        if error:
            raise error
        return {"deviation": 0.01}

    checks = Checks(record, "one")
    assert checks.run("good", lambda: check("good"))
    assert not checks.run("bad", lambda: check("bad", ValueError("too far")))
    assert not run_steps([step("one", "")], record, 60)
    assert not record.has_passed("one")
    again = Checks(record, "one")
    assert again.run("good", lambda: check("good"))
    assert again.run("bad", lambda: check("bad"))
    assert calls == ["good", "bad", "bad"]
    assert run_steps([step("one", "")], record, 60)


def test_worker_that_exits_fails_its_check_only(record: Record):
    def broken() -> dict:
        raise SystemExit(1)

    assert not Checks(record, "one").run("broken", broken)
    assert [each.passed for each in record.of("one")] == [False]


def test_record_survives_a_line_that_was_cut_off(record: Record):
    record.add(Result("one", "a", True))
    with record.file.open("a") as file:
        file.write('{"step": "one", "na')
    record.add(Result("one", END, True))
    assert record.has_passed("one")
    assert [each.name for each in record.of("one")] == ["a"]


def test_every_result_is_in_the_report_at_once(record: Record):
    record.add(Result("one", "mnist", True, values={"deviation": 0.012}))
    report = (record.folder / "report.md").read_text()
    assert "| mnist | passed | 0.0 | deviation 0.012 |" in report
    assert "| The second | not run |" in report


def test_interrupted_command_stops_its_step(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    code = (
        "import sys; from pathlib import Path; from tests.trials.gpu.record import Record;"
        "from tests.trials.gpu.runner import Step, run_steps;"
        f"run_steps([Step('one', 'One', (sys.executable, '-c', {counting(tmp_path / 'begun')!r} + '; import time;"
        f" time.sleep(60)'), 60)], Record(Path({str(tmp_path / 'cpu')!r}), {{'one': 'One'}}), 60)"
    )
    started = ["env", "--default-signal=INT", sys.executable, "-c", code]
    process = subprocess.Popen(started, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "begun").exists)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        assert children
        assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()


def test_command_with_an_unknown_step_or_device_is_rejected(tmp_path: Path):
    output = ["--output", str(tmp_path)]
    assert run(app, *output, "--devices", "cpu", "--steps", "everything").status == 2
    assert run(app, *output, "--devices", "99").status == 2
    assert not list(tmp_path.iterdir())


def test_gpu_of_a_step_is_named_by_the_number_of_the_system(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible("1") == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible("1") == "3"


def test_all_models_with_weights_are_checked():
    assert set(STEPS) == {"units", "answers", "server", "throughput", "options", "memory"}
    assert {"mnist", "avdigits", "cells", "membrane", "molecule"} <= set(MODELS)


def test_ranking_deviates_by_the_largest_change_of_a_probability():
    def answer(**probabilities: float) -> dict:
        entries = [{"label": label, "class": 0, "probability": each} for label, each in probabilities.items()]
        return {"top_k": entries}

    assert compare.deviation(answer(a=0.9, b=0.1), answer(a=0.88, b=0.12)) == pytest.approx(0.02)
    for wrong in (answer(a=0.8, b=0.1), answer(b=0.9, a=0.1), answer(c=0.9, b=0.05)):
        with pytest.raises(compare.TooDifferent):
            compare.deviation(answer(a=0.9, b=0.1), wrong)


def test_detections_deviate_if_one_is_missing_moved_or_new():
    box = {"class": 1, "score": 0.9, "box": [0.0, 0.0, 10.0, 10.0]}
    faint = {"class": 0, "score": 0.36, "box": [50.0, 50.0, 60.0, 60.0]}
    assert compare.deviation({"detections": [box, faint]}, {"detections": [{**box, "score": 0.88}]}) <= 0.03
    for wrong in ([], [{**box, "box": [3.0, 0.0, 13.0, 10.0]}], [{**box, "class": 2}], [box, {**box, "class": 2}]):
        with pytest.raises(compare.TooDifferent):
            compare.deviation({"detections": [box]}, {"detections": wrong})


def test_masks_deviate_by_the_share_of_other_pixels():
    def answer(pixels: int) -> dict:
        mask = numpy.zeros((10, 20), numpy.uint8)
        mask.flat[:pixels] = 1
        file = io.BytesIO()
        Image.fromarray(mask).save(file, "PNG")
        return {"mask": base64.b64encode(file.getvalue()).decode(), "classes": []}

    assert compare.deviation(answer(100), answer(102)) == pytest.approx(0.01)
    with pytest.raises(compare.TooDifferent):
        compare.deviation(answer(100), answer(110))


def test_explanations_deviate_by_norm_and_by_class():
    def answer(label: str, *values: float) -> dict:
        return json.loads(json.dumps({"target": {"label": label}, "attributions": [[each] for each in values]}))

    assert compare.explanation_deviation(answer("a", 1.0, 0.0), answer("a", 0.9, 0.0)) == pytest.approx(0.1)
    for wrong in (answer("b", 1.0, 0.0), answer("a", 0.0, 1.0), answer("a", 1.0), answer("a", float("nan"), 0.0)):
        with pytest.raises(compare.TooDifferent):
            compare.explanation_deviation(answer("a", 1.0, 0.0), wrong)
