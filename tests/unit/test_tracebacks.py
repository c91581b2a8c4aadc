"""Finding the author's exception among the lines of a worker that does not start."""

import pytest

from bundle.server.tracebacks import explain

LOADER = '  File "/x/site-packages/ts/model_loader.py", line 143, in load\n    initialize_fn(service.context)'
OWN = "/tmp/torchserve-a1/models/ecff1bc393514a579afab22eccf1b4f9"
DIED = """\
Backend worker process died.
Traceback (most recent call last):
  File "/x/site-packages/ts/model_service_worker.py", line 301, in <module>
    worker.run_server()"""
UNKNOWN = f"{DIED}\nRuntimeError: 500 - Unknown exception"


def trace(error: str, *files: str) -> str:
    """Return a traceback through TorchServe's loader and these lines of files."""
    frames = [f'  File "{file.split(":")[0]}", line {file.split(":")[1]}, in load' for file in files]
    return "\n".join(["Traceback (most recent call last):", LOADER, *frames, error])


HANDLER = f"{OWN}/handler.py:4"
MISSING_DEFAULT = "ModuleNotFoundError: No module named 'ts.torch_handler.handler'"
DURING = "\n\nDuring handling of the above exception, another exception occurred:\n\n"
BEFORE = "s_name_part0=/tmp/.ts.sock, pid=1\n" + trace("KeyError: 'of an earlier process'", HANDLER) + "\n"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (f"Failed to load model m, exception x\n{trace('RuntimeError: my bug', HANDLER)}\n{UNKNOWN}",
         "RuntimeError: my bug (handler.py, line 4)"),
        (f"{DIED}\n{trace('KeyError: 1', HANDLER)}", "KeyError: 1 (handler.py, line 4)"),
        (DIED + "\nModuleNotFoundError: No module named 'handler'"
         + DURING + trace("ModuleNotFoundError: No module named 'captum'", "/x/ts/torch_handler/vision_handler.py:9"),
         "ModuleNotFoundError: No module named 'captum'"),
        (trace("ModuleNotFoundError: No module named 'nosuch'", HANDLER) + DURING + trace(MISSING_DEFAULT),
         "ModuleNotFoundError: No module named 'nosuch' (handler.py, line 4)"),
        (trace("handler.MyError: mine\ntwo lines\n    indented", HANDLER, "/x/json/decoder.py:5"),
         "handler.MyError: mine two lines indented (handler.py, line 4)"),
        (trace("KeyError: 'a'", HANDLER) + DURING + trace("ValueError: bad", f"{OWN}/sub/part.py:7"),
         "ValueError: bad (sub/part.py, line 7)"),
        (trace("ValueError: no tokens", f"{OWN}/text.py:9", f"{OWN}/handlers/core/tokens.py:3"),
         "ValueError: no tokens (text.py, line 9)"),
        (trace("ValidationError: 1 error\nmax_tokens\n  must be above 0", f"{OWN}/handlers/core/batch.py:3"),
         "ValidationError: 1 error max_tokens must be above 0"),
        (f"{DIED}\nRuntimeError: socket already in use: x.", "RuntimeError: socket already in use: x."),
        (f"Backend worker process died.\nBundleError: {OWN} is refused.", f"BundleError: {OWN} is refused."),
        (f"{trace('KeyError: 1', HANDLER)}\nBackend worker process died.\nBundleError: it changed",
         "BundleError: it changed"),
        (f"{BEFORE}s_name_part0=/tmp/.ts.sock, pid=2\n{UNKNOWN}", "RuntimeError: 500 - Unknown exception"),
    ],
)  # fmt: skip
def test_cause_of_a_failed_start_is_the_authors_exception_with_its_file_and_line(said: str, cause: str):
    what, details = explain(said.splitlines())
    assert what == cause
    assert what.split(":")[0] in details
    assert "another exception" not in details
