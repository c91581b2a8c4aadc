"""What a worker does to its own process: how it reads, what it keeps, and that any module it is given still serves."""

import gc
import logging
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import mode

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bundle.build.dryrun import DryRun
from bundle.build.quantize import load
from bundle.paths import ROOT
from handlers.core import precision, wire
from handlers.core.outputs import main_output
from handlers.core.precision import INT8_NAME, fastest
from models.audio.model import build

CPU = torch.device("cpu")


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=8), st.integers(1, 700))
def test_reads_what_was_sent_however_it_arrives(values: list[bytes], piece: int):
    sender, receiver = socket.socketpair()
    content = b"".join(values)

    def send() -> None:
        for start in range(0, len(content), piece):
            sender.sendall(content[start : start + piece])
        sender.close()

    with sender, receiver:
        thread = threading.Thread(target=send)
        thread.start()
        read = [wire.retrieve_buffer(receiver, len(value)) for value in values]
        thread.join()
        assert read == [bytearray(value) for value in values]
        with pytest.raises(SystemExit):  # the frontend has gone
            wire.retrieve_buffer(receiver, 1)
        wire.readers.pop(receiver).close()


def test_torchserve_reads_through_it():
    """A prediction without requests, as the frontend sends it: TorchServe's own reader gets it out of the buffer."""
    code = (
        "import socket, struct\n"
        "from ts.protocol import otf_message_handler as handler\n"
        "from handlers.core import wire\n"
        "handler._retrieve_buffer\n"  # what is replaced is there
        "wire.buffer_reads()\n"
        "frontend, worker = socket.socketpair()\n"
        "frontend.sendall(b'I' + struct.pack('!i', -1))\n"
        "print(handler.retrieve_msg(worker), worker in wire.readers)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "(bytearray(b'I'), []) True", run.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="page faults are counted on Linux")
def test_freed_memory_is_kept():
    """A block of 4 MiB again and again: without it, each of 40 pages in a thousand pages."""
    code = (
        "import resource, torch; from handlers.core import memory; memory.keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def touch(): torch.ones(1 << 20).add(1)\n"
        "for _ in range(3): touch()\n"
        "before = faults()\n"
        "for _ in range(20): touch()\n"
        "print(faults() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout.splitlines()[-1]) < 10_000, run.stdout + run.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read on Linux")
def test_holes_are_given_back():
    """Of 256 MiB one block in a hundred stays, the last one among them; once, and not again before its time."""
    code = (
        "from pathlib import Path; from handlers.core import memory; memory.keep_freed_memory()\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) >> 8\n"  # MiB
        "def holes(): return [b'x' * (64 << 10) for _ in range(4001)][::100]\n"
        "kept = holes(); full = resident()\n"
        "memory.trim(); early = resident()\n"
        "memory.trimmed -= memory.TRIM_SECONDS; memory.trim(); print(full - early, full - resident())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    early, late = map(int, run.stdout.split())
    assert early < 50, run.stdout + run.stderr
    assert late > 150, run.stdout + run.stderr


def test_a_worker_that_has_started_collects_nothing_twice(worker: DryRun):
    gc.unfreeze()
    try:
        worker.handler.initialize(worker.service.context)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


class Flattening(nn.Module):
    """`view` after a convolution takes the layout of its tensor for granted."""

    def __init__(self):
        super().__init__()
        self.convolve, self.classify = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.convolve(images.float() / 255)
        return self.classify(features.view(features.size(0), -1))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolve, self.classify = nn.Conv3d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.convolve(images.float().unsqueeze(1)).amax((2, 3, 4)))


class Accumulating(nn.Module):
    """Adds what autocast reduces into what stays float32."""

    def __init__(self):
        super().__init__()
        self.classify = nn.Linear(3 * 8 * 8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.classify(images.float().flatten(1))
        return torch.zeros_like(rows, dtype=torch.float32).index_add_(0, torch.arange(rows.size(0)), rows)


@torch.inference_mode()
@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("module", [Flattening, Volumes, Accumulating])
@pytest.mark.parametrize("traced", [False, True])
def test_any_module_serves(module: type[nn.Module], wanted: str, traced: bool, tmp_path: Path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    eager = module().eval()
    exported = torch.jit.trace(eager, images) if traced else torch.jit.script(eager)
    exported.save(tmp_path / "model.pt")
    taken, served = fastest(load(tmp_path / "model.pt"), wanted, CPU, (images,), tmp_path)
    tolerance = 1e-4 if taken == "float32" else 0.05
    torch.testing.assert_close(served(images).float(), eager(images), rtol=tolerance, atol=tolerance * 100)


def test_outputs_that_cannot_be_served_are_named():
    with pytest.raises(TypeError, match="returns a dict"):
        main_output({"logits": torch.zeros(1)})


def test_cepstra_are_those_of_torchaudio():
    model = build()
    waveforms = torch.rand(3, 16_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(model.cepstra(waveforms), model.mfcc(waveforms), rtol=1e-4, atol=1e-4)


def test_a_precision_that_does_not_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.jit.script(Accumulating().eval()).save(tmp_path / "model.pt")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert fastest(load(tmp_path / "model.pt"), "bfloat16", CPU, (images,), tmp_path)[0] == "float32"
    assert "not frozen in bfloat16" in caplog.text
    assert "the model computes in float32" in caplog.text


@torch.inference_mode()
def test_int8_gives_way_where_the_device_has_no_instructions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "native_precisions", lambda *_: [])
    torch.jit.script(nn.Linear(2, 2).eval()).save(tmp_path / "model.pt")
    shutil.copy(tmp_path / "model.pt", tmp_path / INT8_NAME)
    assert fastest(load(tmp_path / "model.pt"), "int8", CPU, (torch.ones(1, 2),), tmp_path)[0] == "float32"
    assert "precision is int8, which does not work here" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_a_fixed_precision_is_all_that_is_frozen(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frozen, freeze = [], precision.freeze
    monkeypatch.setattr(
        precision, "freeze", lambda model, name, *rest: frozen.append(name) or freeze(model, name, *rest)
    )
    torch.jit.script(nn.Linear(2, 2).eval()).save(tmp_path / "model.pt")
    assert fastest(load(tmp_path / "model.pt"), wanted, CPU, (torch.ones(1, 2),), tmp_path)[0] == wanted
    assert frozen == [wanted]


class Turning(nn.Module):
    """Rolls its rows by a quarter, so that four products more are the same outputs, for more work."""

    def __init__(self, products: int):
        super().__init__()
        self.products = products
        self.register_buffer("turn", torch.eye(128).roll(32, dims=0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for _ in range(self.products):
            rows = rows @ self.turn
        return rows


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers have: two would wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("products", "taken"), [(41, "int8"), (197, "float32")])
def test_what_is_much_faster_is_taken_and_what_is_little_faster_is_not(
    products: int, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both in float32: the module of an archive that is called int8 may be any."""
    monkeypatch.setattr(precision, "native_precisions", lambda *_: ["int8"])
    for name, count in {"model.pt": 201, INT8_NAME: products}.items():
        torch.jit.script(Turning(count).eval()).save(tmp_path / name)
    inputs = (torch.rand(32, 128),)
    choices = [fastest(load(tmp_path / "model.pt"), "auto", CPU, inputs, tmp_path)[0] for _ in range(5)]
    assert mode(choices) == taken  # a busy machine may mislead one of them
