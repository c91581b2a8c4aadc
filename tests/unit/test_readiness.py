"""Reading the cause of a worker's failure from the logs."""

from pathlib import Path

import pytest

from bundle.server import readiness
from bundle.server.readiness import worker_failure

PREFIX = "2026-11-28T10:00:00,000 [INFO ] W-9000-digits_1.0-stdout MODEL_LOG - "
TRACE = """Backend worker process died.
Traceback (most recent call last):
  File "service.py", line 1, in <module>
    load()
  File "handler.py", line 2, in load
    raise FileNotFoundError("no weights")
FileNotFoundError: no weights"""


def test_worker_failure_read_while_its_traceback_is_logged_has_the_whole_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With each pause, another line is logged."""
    lines = [f"{PREFIX}{line}\n" for line in TRACE.splitlines()]
    log = tmp_path / "model_log.log"
    log.write_text("".join(lines[:4]))
    rest = iter(lines[4:])

    def pause(_: float) -> None:
        with log.open("a") as file:
            file.write(next(rest, ""))

    monkeypatch.setattr(readiness.time, "sleep", pause)
    failure = worker_failure(tmp_path, "digits")
    assert str(failure) == "A worker of digits failed: FileNotFoundError: no weights"
    assert failure is not None
    assert failure.details == TRACE.split("\n", 1)[1]


@pytest.mark.parametrize(("model", "slow"), [("digits", True), ("image", False)])
def test_start_that_takes_too_long_is_told_from_a_slow_prediction_of_another_model(
    tmp_path: Path, model: str, slow: bool
):
    """TorchServe writes the same exception for both."""
    failed = "2026-11-28T10:00:00,000 [ERROR] W-9000-{}_1.0 WorkerThread - Backend worker error\n"
    retried = "2026-11-28T10:00:01,000 [INFO ] W-9000-digits_1.0 WorkerThread - Retry worker: 9000 in 1 seconds.\n"
    exception = "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time\n"
    (tmp_path / "ts_log.log").write_text(f"{failed.format(model)}{exception}\tat Thread.run\n" + 3 * retried)
    failure = worker_failure(tmp_path, "digits")
    assert failure is not None
    assert ("do not start within the startupTimeout" in str(failure)) == slow
    assert ("GiB are free" in str(failure)) != slow
    assert "Thread.run" not in failure.details
