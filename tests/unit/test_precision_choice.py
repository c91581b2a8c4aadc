"""All workers of a server take the precision that the first one has chosen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle.paths import ROOT
from handlers.core.precision import fastest

pytestmark = pytest.mark.slow  # the workers are processes
CPU = torch.device("cpu")
CHOOSE = """
import sys
from pathlib import Path
import torch
from handlers.core import precision

folder, fast = Path(sys.argv[1]), sys.argv[2]
precision.native_precisions = lambda *_: ["bfloat16"]
precision.measure = lambda modules, *_: {name: 0.1 if name == fast else 1.0 for name in modules}
input()  # starts all at the same time
with torch.inference_mode():
    module = torch.jit.load(folder / "model.pt").eval()
    print(precision.fastest(module, "auto", torch.device("cpu"), (torch.ones(1, 2),), folder)[0])
"""


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that TorchServe has unpacked."""
    monkeypatch.setenv("TEMP", str(tmp_path))
    folder = tmp_path / "models" / "digest"
    folder.mkdir(parents=True)
    torch.jit.script(nn.Linear(2, 2)).save(folder / "model.pt")
    return folder


@torch.inference_mode()
def chosen_where(fast: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a worker of this process chooses if it measures that this precision is the fastest."""
    monkeypatch.setattr("handlers.core.precision.native_precisions", lambda *_: ["bfloat16"])
    monkeypatch.setattr(
        "handlers.core.precision.measure",
        lambda modules, *_: {name: 0.1 if name == fast else 1.0 for name in modules},
    )
    module = torch.jit.load(folder / "model.pt").eval()
    return fastest(module, "auto", CPU, (torch.ones(1, 2),), folder)[0]


def test_workers_of_a_server_take_the_same_precision(unpacked: Path):
    """Half of the workers measure that bfloat16 is faster, and half that float32 is."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CHOOSE, str(unpacked), fast],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for fast in ("bfloat16", "float32", "bfloat16", "float32")
    ]
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    chosen = [worker.communicate(timeout=60)[0] for worker in workers]
    assert chosen in (["bfloat16\n"] * 4, ["float32\n"] * 4)
    assert [path.name for path in unpacked.iterdir()] == ["model.pt"], "the guard refuses a folder with a new file"
    assert len(list(unpacked.parent.iterdir())) == 2


def test_restarted_worker_takes_the_precision_of_the_first_one(unpacked: Path, monkeypatch: pytest.MonkeyPatch):
    assert chosen_where("bfloat16", unpacked, monkeypatch) == "bfloat16"
    assert chosen_where("float32", unpacked, monkeypatch) == "bfloat16"


def test_folder_that_torchserve_has_not_unpacked_gets_no_file(unpacked: Path, monkeypatch: pytest.MonkeyPatch):
    for temporary in ("", "/elsewhere"):
        monkeypatch.setenv("TEMP", temporary)
        assert chosen_where("bfloat16", unpacked, monkeypatch) == "bfloat16"
        assert chosen_where("float32", unpacked, monkeypatch) == "float32"
    assert [path.name for path in unpacked.parent.iterdir()] == ["digest"]


def test_next_server_with_the_same_process_id_chooses_again(unpacked: Path):
    """Each server is process 1 of its own container, as it would be on another machine."""
    container = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*container, "true"]).returncode != 0:
        pytest.skip("no namespaces")
    server = [*container, "sh", "-c", '"$@"; exit $?', "server"]  # waits for its worker, and does not become it
    chosen = [
        subprocess.run(
            [*server, sys.executable, "-c", CHOOSE, str(unpacked), fast],
            input="\n", stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
        ).stdout
        for fast in ("bfloat16", "float32")
    ]  # fmt: skip
    assert chosen == ["bfloat16\n", "float32\n"]


def test_choice_that_cannot_be_written_is_left_to_each_worker(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    assert chosen_where("bfloat16", unpacked, monkeypatch) == "bfloat16"
    assert chosen_where("float32", unpacked, monkeypatch) == "float32"
    assert "workers of this model may choose different precisions" in caplog.text
