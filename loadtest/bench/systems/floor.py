"""The floor: the bundle's server with a handler that returns a constant.

It measures what the frontend, the worker's protocol and the load generator take, without a model. A case's floor gets
the case's own requests, and has the worker settings of its model folder. Its answer is that of the reference pipeline,
so that requests and answers are as large as those of the other systems.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError
from bundle.files import write_atomically
from loadtest.bench.cases import Case
from loadtest.bench.paths import ROOT, WORK
from loadtest.bench.results import FLOOR

FILES = Path(__file__).parent.parent / "floor"  # of every floor's model folder
ANSWER = "answer.json"
SETTINGS = {"bundle": {"version": "1.0", "handler": "./handler.py", "files": [ANSWER]}}


def make(case: Case) -> Path:
    """Write the model folder of a case's floor, and return it.

    Raises:
        BundleError: the reference pipeline did not answer.
    """
    folder = WORK / "floor" / f"{FLOOR}-{case.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES.glob("*.py"):
        shutil.copy(file, folder)
    (folder / ANSWER).write_bytes(reference_answer(case.name))
    config = {key: value for key, value in ModelFolder(case.folder).config.items() if key != "handler"}
    write_atomically(folder / CONFIG_NAME, yaml.safe_dump(config | SETTINGS, sort_keys=False))
    return folder


@functools.cache
def reference_answer(case: str) -> bytes:
    """Return the reference pipeline's answer as JSON. It runs in another process, which frees its memory.

    Raises:
        BundleError: the pipeline failed.
    """
    run = subprocess.run(
        [sys.executable, "-m", "loadtest.bench.pipeline", case], cwd=ROOT, capture_output=True, check=False
    )
    if run.returncode:
        raise BundleError("The reference pipeline failed.", run.stderr.decode(errors="replace"))
    return run.stdout.strip()
