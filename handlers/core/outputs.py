"""What a TorchScript module returns: a tensor, or tuples, lists and dicts of tensors."""

from collections.abc import Iterator

from torch import Tensor

Outputs = Tensor | tuple | list | dict


def to_host(outputs: Outputs) -> Outputs:
    """Return the same structure with every tensor on the CPU."""
    if isinstance(outputs, Tensor):
        return outputs.cpu()
    if isinstance(outputs, dict):
        return {key: to_host(value) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type_of(outputs)(to_host(value) for value in outputs)
    return outputs


def rows(outputs: Outputs) -> list:
    """Split the outputs of a batch into those of each sample.

    Args:
        outputs: a tensor, [N, ...]; a tuple or a dict of such tensors, whose rows are tuples or dicts; or a list with
            an entry a sample, as TorchVision's detectors return it.

    Raises:
        TypeError: the outputs are something else, or hold different numbers of rows.
    """
    if isinstance(outputs, list):
        return outputs
    if isinstance(outputs, Tensor) and outputs.dim():
        return list(outputs.unbind())
    if isinstance(outputs, (tuple, dict)) and outputs:
        columns = [rows(value) for value in (outputs.values() if isinstance(outputs, dict) else outputs)]
        if len({len(column) for column in columns}) > 1:
            raise TypeError(f"the outputs hold {' and '.join(str(len(column)) for column in columns)} rows")
        split = list(zip(*columns, strict=True))
        return [dict(zip(outputs, row, strict=True)) for row in split] if isinstance(outputs, dict) else split
    raise TypeError(f"a {type(outputs).__name__} cannot be split into one row a sample: override `reduce`")


def tensors(outputs: object) -> Iterator[Tensor]:
    """Yield every tensor in the outputs, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple, dict)):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors(value)


def main_output(outputs: object) -> Tensor:
    """Return the tensor that a classifier's outputs are about: models with auxiliary outputs return the main one first.

    Raises:
        TypeError: it is not a tensor.
    """
    main = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(main, Tensor):
        raise TypeError(
            f"the model returns a {type(main).__name__}; a classifier must return a tensor, or a tuple of tensors"
        )
    return main


def type_of(values: list | tuple) -> type:
    """A named tuple cannot be made of an iterable: its values alone are kept."""
    return list if isinstance(values, list) else tuple
