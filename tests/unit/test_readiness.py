"""Reading the cause of a worker's failure from the logs."""

import threading
import time
from pathlib import Path

from bundle.server.readiness import POLL_SECONDS, worker_failure

PREFIX = "2026-11-28T10:00:00,000 [INFO ] W-9000-digits_1.0-stdout MODEL_LOG - "
TRACE = """Backend worker process died.
Traceback (most recent call last):
  File "service.py", line 1, in <module>
    load()
  File "handler.py", line 2, in load
    raise FileNotFoundError("no weights")
FileNotFoundError: no weights"""


def test_worker_failure_read_while_its_traceback_is_logged_has_the_whole_traceback(tmp_path: Path):
    lines = [f"{PREFIX}{line}\n" for line in TRACE.splitlines()]
    log = tmp_path / "model_log.log"
    log.write_text("".join(lines[:4]))

    def log_the_rest() -> None:
        with log.open("a") as file:
            for line in lines[4:]:
                time.sleep(POLL_SECONDS / 3)
                file.write(line)
                file.flush()

    writer = threading.Thread(target=log_the_rest)
    writer.start()
    failure = worker_failure(tmp_path, "digits")
    writer.join()
    assert str(failure) == "A worker of digits failed: FileNotFoundError: no weights"
    assert failure is not None
    assert failure.details == TRACE.split("\n", 1)[1]
