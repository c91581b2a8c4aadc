"""Faults of a device, by what PyTorch raises: a plain RuntimeError with the text of it, out of a TorchScript module."""

import torch

NO_ROOM = ("CUDA out of memory", "CUDA error: out of memory")
BROKEN = "CUDA error:"


def is_out_of_memory(error: BaseException) -> bool:
    """A smaller batch may fit."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_ROOM)


def is_broken(error: BaseException) -> bool:
    """Whatever this process asks of the device from now on fails, too."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and BROKEN in str(error))
