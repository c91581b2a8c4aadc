"""Choose the device, and recognise its faults. Inside a TorchScript module, PyTorch raises them as a RuntimeError."""

import torch

OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",  # of kernels that TorchScript's fuser has compiled
    "CUBLAS_STATUS_ALLOC_FAILED",  # the libraries allocate workspaces of their own
    "CUBLAS_STATUS_NOT_INITIALIZED",  # of cublasCreate, if the memory does not suffice for it
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
DEVICE_FAULTS = ("CUDA error:", "CUDA driver error:")


def select(device: torch.device) -> None:
    """Make a GPU the current one of this process.

    Otherwise the first GPU would be, whose memory all workers would share, and whose capabilities PyTorch reports.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_broken(error: BaseException) -> bool:
    """Return whether every further call of this process to the device will fail, too."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_FAULTS)
