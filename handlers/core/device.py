"""Recognise the faults of a device. Inside a TorchScript module, PyTorch raises them as a plain RuntimeError."""

import torch

OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory")
DEVICE_FAULT = "CUDA error:"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_broken(error: BaseException) -> bool:
    """Return whether every further call of this process to the device will fail, too."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and DEVICE_FAULT in str(error))
