"""Write TorchScript files."""

from pathlib import Path

import torch


def save(module: torch.jit.ScriptModule, target: Path) -> None:
    """Write a module.

    PyTorch's own writer ends the whole process if the disk is full, so the file is made in memory, as a second copy of
    the module.

    Raises:
        OSError: the file cannot be written.
    """
    target.write_bytes(module.save_to_buffer())
