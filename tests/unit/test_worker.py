"""A worker's own process: how it keeps memory, and chooses a module's precision."""

import gc
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle.build.dryrun import DryRun
from bundle.build.quantize import load
from bundle.paths import ROOT
from handlers.core import precision
from handlers.core.outputs import main_output
from handlers.core.precision import INT8_NAME, fastest
from models.audio.model import build

CPU = torch.device("cpu")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")


def run_in_new_process(code: str) -> list[str]:
    """Run Python code after `keep_freed_memory`; return what it prints, word by word."""
    code = f"from handlers.core import memory; memory.keep_freed_memory()\n{code}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@glibc
def test_freed_blocks_stay_in_the_heap():
    in_heap, kept = run_in_new_process(
        "import pathlib\n"
        "def heap():\n"
        "    [line] = [l for l in pathlib.Path('/proc/self/maps').read_text().splitlines() if l.endswith('[heap]')]\n"
        "    return range(*(int(address, 16) for address in line.split()[0].split('-')))\n"
        "blocks = [b'x' * (4 << 20) for _ in range(8)]\n"
        "full = heap()\n"
        "in_heap = sum(id(block) in full for block in blocks)\n"
        "blocks.clear()\n"
        "print(in_heap, heap() == full)"
    )
    assert (in_heap, kept) == ("8", "True")


@glibc
def test_trim_returns_free_blocks_to_the_system_every_ten_seconds():
    """Of 256 MiB, every hundredth block stays in use, the last one too."""
    early, late = run_in_new_process(
        "import time; from pathlib import Path\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) >> 8\n"  # MiB
        "def holes(): return [b'x' * (64 << 10) for _ in range(4001)][::100]\n"
        "kept = holes(); full = resident()\n"
        "memory.trimmed = time.monotonic(); memory.trim(); early = resident()\n"
        "memory.trimmed -= memory.TRIM_SECONDS; memory.trim(); print(full - early, full - resident())\n"
    )
    assert int(early) < 50
    assert int(late) > 150


def test_initialized_worker_freezes_its_objects(worker: DryRun):
    gc.unfreeze()
    try:
        worker.handler.initialize(worker.service.context)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


class Flattening(nn.Module):
    """Fails in channels_last: `view` after a convolution needs a contiguous tensor."""

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
    """Fails under autocast, which reduces the source of `index_add_` and not its target."""

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
def test_fastest_serves_every_kind_of_module(module: type[nn.Module], wanted: str, traced: bool, tmp_path: Path):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    eager = module().eval()
    exported = torch.jit.trace(eager, images) if traced else torch.jit.script(eager)
    exported.save(tmp_path / "model.pt")
    taken, served = fastest(load(tmp_path / "model.pt"), wanted, CPU, (images,), tmp_path)
    tolerance = 1e-4 if taken == "float32" else 0.05
    torch.testing.assert_close(served(images).float(), eager(images), rtol=tolerance, atol=tolerance * 100)


def test_outputs_of_an_unsupported_type_are_named():
    with pytest.raises(TypeError, match="returns a dict"):
        main_output({"logits": torch.zeros(1)})


def test_cepstra_match_torchaudios():
    model = build()
    waveforms = torch.rand(3, 16_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(model.cepstra(waveforms), model.mfcc(waveforms), rtol=1e-4, atol=1e-4)


def test_precision_that_does_not_run_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.jit.script(Accumulating().eval()).save(tmp_path / "model.pt")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert fastest(load(tmp_path / "model.pt"), "bfloat16", CPU, (images,), tmp_path)[0] == "float32"
    assert "not frozen in bfloat16" in caplog.text
    assert "the model computes in float32" in caplog.text


@torch.inference_mode()
def test_int8_without_instructions_falls_back_to_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "native_precisions", lambda *_: [])
    torch.jit.script(nn.Linear(2, 2).eval()).save(tmp_path / "model.pt")
    shutil.copy(tmp_path / "model.pt", tmp_path / INT8_NAME)
    assert fastest(load(tmp_path / "model.pt"), "int8", CPU, (torch.ones(1, 2),), tmp_path)[0] == "float32"
    assert "precision is int8, which does not work here" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_fixed_precision_freezes_one_module_only(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frozen, freeze = [], precision.freeze
    monkeypatch.setattr(
        precision, "freeze", lambda model, name, *rest: frozen.append(name) or freeze(model, name, *rest)
    )
    torch.jit.script(nn.Linear(2, 2).eval()).save(tmp_path / "model.pt")
    assert fastest(load(tmp_path / "model.pt"), wanted, CPU, (torch.ones(1, 2),), tmp_path)[0] == wanted
    assert frozen == [wanted]


@pytest.mark.parametrize(("int8_seconds", "chosen"), [(0.89, "int8"), (0.91, "float32")])
@torch.inference_mode()
def test_auto_chooses_a_precision_that_saves_a_tenth_of_the_time(
    int8_seconds: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "native_precisions", lambda *_: ["int8"])
    monkeypatch.setattr(precision, "measure", lambda *_: {"float32": 1.0, "int8": int8_seconds})
    torch.jit.script(nn.Linear(2, 2).eval()).save(tmp_path / "model.pt")
    shutil.copy(tmp_path / "model.pt", tmp_path / INT8_NAME)
    assert fastest(load(tmp_path / "model.pt"), "auto", CPU, (torch.ones(1, 2),), tmp_path)[0] == chosen


def test_measure_returns_the_shortest_run_after_the_warm_up(monkeypatch: pytest.MonkeyPatch):
    """On a clock that only the modules advance."""
    now = 0.0
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)

    def module(*seconds: float) -> Callable[[], None]:
        durations = iter(seconds)

        def run() -> None:
            nonlocal now
            now += next(durations)

        return run

    runs = precision.WARM_UP_RUNS + precision.MEASURED_RUNS
    assert runs == 7
    modules = {"float32": module(1, 1, 9, 9, 5, 9, 9), "int8": module(9, 9, 3, 4, 4, 4, 4)}
    assert precision.measure(modules, (), CPU) == {"float32": 5, "int8": 3}
