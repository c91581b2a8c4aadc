"""Copy batches to the worker's device, and their outputs back.

A GPU copies without the CPU only from and to page-locked memory. PyTorch keeps such memory when it is freed, and uses
it again as soon as no copy needs it any more: a buffer whose copy is still running is never overwritten, however many
batches are under way.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from handlers.core.outputs import Outputs, mapped, to_host

logger = logging.getLogger(__name__)


class Staging:
    """The copies of a worker.

    If page-locked memory cannot be allocated, a warning is logged, and ordinary memory is used from then on.

    Attributes:
        pinned: whether page-locked memory is used: for GPUs only.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pinned = device.type == "cuda"

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack tensors of one shape, where the device can copy them from."""
        first = tensors[0]
        # `torch.stack` finds a common dtype, but not with `out`
        if not self.pinned or any(each.dtype != first.dtype for each in tensors):
            return torch.stack(tuple(tensors))
        return torch.stack(tuple(tensors), out=self.empty((len(tensors), *first.shape), first.dtype))

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the host. A GPU's copy is only started here; what it computes afterwards waits for it."""
        if self.pinned and not tensor.is_pinned():
            tensor = self.empty(tensor.shape, tensor.dtype).copy_(tensor)
        return tensor.to(self.device, non_blocking=True)

    def to_host(self, outputs: Outputs) -> Outputs:
        """Return the same structure with every tensor on the host: all copies are started, then awaited together."""
        if not self.pinned:
            return to_host(outputs)
        copied = mapped(outputs, self.start_copy)
        torch.cuda.current_stream(self.device).synchronize()
        return copied

    def start_copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate memory on the host, page-locked if possible."""
        if self.pinned:
            try:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
            except RuntimeError as exc:  # if the device is broken, the next copy fails, too
                self.pinned = False
                reason = str(exc).strip().splitlines()[0]
                logger.warning("no page-locked memory, so that copies to the GPU are slower: %s", reason)
        return torch.empty(shape, dtype=dtype)
