"""Replay a module as CUDA graphs: the CPU starts a whole batch at once, instead of each operation by itself.

A graph repeats the recorded operations on the same memory, and therefore with the same number of inputs. A few batch
sizes are recorded; other batches are padded.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handlers.core.outputs import Outputs, mapped, tensors
from handlers.core.precision import relative_error

logger = logging.getLogger(__name__)

Module = Callable[..., Outputs]

SETTLING_RUNS = 3  # before a recording: TorchScript profiles the first run and compiles in the second
MAX_ERROR = 1e-2  # of a replay, relative to the ordinary outputs' norm: both run the same operations
interrupted = (
    False  # whether a recording failed in this process: PyTorch keeps parts of it, which would break the next one
)


class NotReplayable(ValueError):
    """The module, or this worker, cannot use CUDA graphs."""


@dataclass(frozen=True)
class Recording:
    """A module's run with one batch size.

    Attributes:
        replay: repeats the run: reads `inputs`, and writes `outputs`.
        inputs: [size, ...] each.
        outputs: tensors [size, ...]; tuples or dicts of them.
    """

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    outputs: Outputs

    def fits(self, batch: tuple[Tensor, ...]) -> bool:
        """Return whether a batch differs from the recorded one at most in having fewer rows."""
        return (
            len(batch) == len(self.inputs)
            and all(each.dim() and len(each) == len(batch[0]) <= len(self.inputs[0]) for each in batch)
            and all(
                each.dtype == kept.dtype and each.shape[1:] == kept.shape[1:]
                for each, kept in zip(batch, self.inputs, strict=True)
            )
        )

    @torch.inference_mode()
    def run(self, batch: tuple[Tensor, ...]) -> Outputs:
        """Return the outputs of a batch that fits. The next run does not change them.

        The rows after the batch's own keep what they had: valid inputs, whose outputs are left out.
        """
        rows = len(batch[0])
        for kept, each in zip(self.inputs, batch, strict=True):
            kept[:rows].copy_(each, non_blocking=True)
        self.replay()
        return mapped(self.outputs, lambda output: output[:rows].clone())


class Replayed:
    """A module that replays what was recorded, and runs every other batch as usual.

    Args:
        module: any batch can be run with it.
        recordings: of different sizes.
    """

    def __init__(self, module: Module, recordings: list[Recording]):
        self.module = module
        self.recordings = sorted(recordings, key=lambda each: len(each.inputs[0]))

    @property
    def sizes(self) -> list[int]:
        return [len(each.inputs[0]) for each in self.recordings]

    def __call__(self, *batch: Tensor) -> Outputs:
        smallest = next((each for each in self.recordings if each.fits(batch)), None)
        return self.module(*batch) if smallest is None else smallest.run(batch)


def replayed(
    module: Module, example: Callable[[int], tuple[Tensor, ...]], largest: int, device: torch.device, model: str
) -> Module:
    """Record a module; if that fails, log a warning that says why, and return the module itself.

    Args:
        module: frozen.
        example: makes a batch of a size, on the device.
        largest: the largest batch.
        device: of the worker. A GPU is the current one.
        model: its name, for the log.

    Raises:
        RuntimeError: the device or its memory cannot be used after a recording that failed. The worker must not start.
    """
    try:
        if device.type != "cuda":
            raise NotReplayable("the worker has no GPU")
        if interrupted:
            raise NotReplayable("an earlier recording failed in this process")
        recordings, used = record_all(module, example, largest)
    except (RuntimeError, ValueError) as exc:
        logger.warning("%s runs without CUDA graphs (set cuda_graphs: false): %s", model, first_reason(exc))
    else:
        result = Replayed(module, recordings)
        logger.info("%s replays CUDA graphs of %s inputs, which take %d MiB", model, result.sizes, used >> 20)
        return result
    # outside the `except` block: the exception refers to the frames, and they refer to the tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # fails if PyTorch believes that a recording is still running
    return module


def recorded_sizes(largest: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16 ... and the largest: a padded batch has less than 1.5 times its own rows."""
    sizes = {size for power in range(largest.bit_length()) for size in (1 << power, 3 << power >> 1) if size < largest}
    return sorted(sizes | {largest})


def record_all(
    module: Module, example: Callable[[int], tuple[Tensor, ...]], largest: int
) -> tuple[list[Recording], int]:
    """Record the largest size first: the smaller ones share its memory, because only one of them runs at a time.

    Returns:
        the recordings, and the bytes that they take.

    Raises:
        NotReplayable: the module's inputs or outputs do not have one row for each sample.
        RuntimeError: the module does something that cannot be recorded, such as waiting for the GPU.
    """
    free_before = torch.cuda.mem_get_info()[0]
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # also restores the current stream if a recording fails
        recordings = [record(module, example(size), size, pool, stream) for size in recorded_sizes(largest)[::-1]]
    torch.cuda.synchronize()
    return recordings, max(0, free_before - torch.cuda.mem_get_info()[0])


def record(module: Module, inputs: tuple[Tensor, ...], size: int, pool: Any, stream: torch.cuda.Stream) -> Recording:
    """Record a run, and check that its replay computes the same."""
    global interrupted
    check_batched(inputs, size)
    torch.cuda.synchronize()  # the inputs may have been made on another stream
    for _ in range(SETTLING_RUNS):
        expected = module(*inputs)
    check_batched(expected, size)  # before the recording, which would be interrupted
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = module(*inputs)
    except BaseException:
        interrupted = True
        # PyTorch 2.11 omits it (pytorch/pytorch#180395); memory could not be returned to the GPU any more
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    for output in tensors(outputs):
        output.zero_()
    graph.replay()
    if relative_error(outputs, expected) > MAX_ERROR:
        raise NotReplayable("a replay does not compute what the module does")
    return Recording(graph.replay, inputs, outputs)


def check_batched(values: Outputs, size: int) -> None:
    """Check that the values are tensors with a row for each sample, or tuples or dicts of them.

    Raises:
        NotReplayable: they are not.
    """
    if isinstance(values, (tuple, dict)) and values:
        for each in values.values() if isinstance(values, dict) else values:
            check_batched(each, size)
    elif not isinstance(values, Tensor) or not values.dim() or len(values) != size:
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise NotReplayable(f"an input or output does not have one row for each of {size} samples: {found}")


def first_reason(error: BaseException) -> str:
    """Return the first line of the error that came first: ending a failed recording raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
