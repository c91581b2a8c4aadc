"""What a TorchScript module returns: a tensor, or tuples, lists and dicts of tensors."""

from collections.abc import Callable, Iterator

from torch import Tensor

Outputs = Tensor | tuple | list | dict


def to_host(outputs: Outputs) -> Outputs:
    """Return the same structure with every tensor on the CPU."""
    return mapped(outputs, Tensor.cpu)


def mapped(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Return the same structure with every tensor changed."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, dict):
        return {key: mapped(value, change) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return sequence_type(outputs)(mapped(value, change) for value in outputs)
    return outputs


def split_rows(outputs: Outputs) -> list:
    """Split the outputs of a batch into one row per sample.

    Args:
        outputs: a tensor, [N, ...]; a tuple or a dict of such tensors, whose rows are tuples or dicts; or a list with
            one entry per sample, as TorchVision's detectors return it.

    Raises:
        TypeError: the outputs have another type, or their numbers of rows differ.
    """
    if isinstance(outputs, list):
        return outputs
    if isinstance(outputs, Tensor) and outputs.dim():
        return list(outputs.unbind())
    if isinstance(outputs, (tuple, dict)) and outputs:
        columns = [split_rows(value) for value in (outputs.values() if isinstance(outputs, dict) else outputs)]
        if len({len(column) for column in columns}) > 1:
            counts = " and ".join(str(len(column)) for column in columns)
            raise TypeError(f"the outputs have different numbers of rows: {counts}. Override `reduce`")
        split = list(zip(*columns, strict=True))
        return [dict(zip(outputs, row, strict=True)) for row in split] if isinstance(outputs, dict) else split
    raise TypeError(f"a {type(outputs).__name__} cannot be split into one row per sample: override `reduce`")


def count_rows(outputs: Outputs) -> int:
    """Return the number of rows that `split_rows` makes, without splitting a tensor.

    Raises:
        TypeError: the outputs cannot be split.
    """
    return len(outputs) if isinstance(outputs, Tensor) and outputs.dim() else len(split_rows(outputs))


def check_rows(outputs: Outputs, count: int, method: str) -> None:
    """Check that a method returned one row per sample: otherwise, requests would get each other's answers.

    Raises:
        RuntimeError: it did not.
    """
    if (rows := count_rows(outputs)) != count:
        raise RuntimeError(
            f"{method} returned {rows} rows for {count} samples. It must return exactly one row per sample: pad rows "
            "that differ in length, and cut them in `encode`."
        )


def tensors(outputs: object) -> Iterator[Tensor]:
    """Yield every tensor in the outputs, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple, dict)):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors(value)


def main_output(outputs: object) -> Tensor:
    """Return a classifier's scores: models with auxiliary outputs return a tuple that begins with them.

    Raises:
        TypeError: the main output is not a tensor.
    """
    main = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(main, Tensor):
        raise TypeError(
            f"the model returns a {type(main).__name__}; a classifier must return a tensor, or a tuple of tensors"
        )
    return main


def sequence_type(values: list | tuple) -> type:
    """Return `list` or `tuple`: a named tuple, which cannot be made from an iterable, becomes a plain one."""
    return list if isinstance(values, list) else tuple
