"""TorchScript files are written whole, or not at all."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from bundle.build import torchscript


@pytest.fixture
def module() -> torch.jit.ScriptModule:
    return torch.jit.script(nn.Linear(2, 3))


def test_written_module_is_the_same(module: torch.jit.ScriptModule, tmp_path: Path):
    torchscript.save(module, tmp_path / "model.pt")
    inputs = torch.rand(4, 2)
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(inputs), module(inputs))


def test_full_disk_is_an_error_of_the_system(module: torch.jit.ScriptModule):
    """PyTorch's own writer would end this process."""
    with pytest.raises(OSError, match="No space left") as caught:
        torchscript.save(module, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
