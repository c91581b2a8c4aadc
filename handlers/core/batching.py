"""Find out whether a module takes a batch, or only one input: tracing with `view(1, -1)` makes such modules."""

import logging
from collections.abc import Callable

from handlers.core import device
from handlers.core.outputs import Outputs, count_rows

logger = logging.getLogger(__name__)


def takes_batch(run: Callable[[], Outputs], size: int, model: str) -> bool:
    """Return whether a run of several inputs returns one row for each; if not, log a warning that says what it costs.

    Args:
        run: runs the module and `reduce` on a batch. They are known to work on one input.
        size: of the batch.
        model: its name, for the log.

    Raises:
        Exception: the device is broken, or has not enough memory; that says nothing about the module.
    """
    try:
        rows = count_rows(run())
        problem = f"it returns {rows} rows for {size} inputs"
    except Exception as exc:
        if isinstance(exc, MemoryError) or device.is_broken(exc) or device.is_out_of_memory(exc):
            raise
        rows, problem = 0, (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
    if rows == size:
        return True
    logger.warning(
        "%s takes one input, and no batch (%s): the inputs of a batch run one after the other, so that a batch of N "
        "takes N times as long as one input. Script the module, or trace it with view(x.size(0), -1).",
        model,
        problem,
    )
    return False
