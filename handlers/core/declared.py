"""What a handler declares for clients of the Open Inference Protocol: tensors that it takes, and those of its answers.

A handler that declares neither takes files, texts and JSON, and answers JSON.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from handlers.core.tensor_data import BYTES

JSON, PICTURE = "json", "picture"  # outputs that every handler has: the whole answer
METADATA_NAME = "open_inference.json"  # the archive's file of `metadata`, which the frontend's agent reads
PLATFORM = "pytorch_torchscript"


@dataclass(frozen=True)
class Column:
    """A part of the answer that clients can have as a tensor.

    Attributes:
        name: of the output.
        datatype: of its elements.
        path: where they are in the answer: ("scores",) is a list of them or, with the shape (), the only one;
            ("found", "score") is a list of objects that each have one.
        shape: of one sample. Its first dimension is -1 if answers differ in length: shorter ones are filled up, with
            -1 (integers), 0 (other numbers) or empty strings.
    """

    name: str
    datatype: str
    path: tuple[str, ...]
    shape: tuple[int, ...] = (-1,)

    def of(self, answer: Any) -> Any:
        entries = answer[self.path[0]]
        return [entry[self.path[1]] for entry in entries] if len(self.path) > 1 else entries


@dataclass(frozen=True)
class TensorInput:
    """A tensor of the module that clients can send.

    Attributes:
        name: of the input.
        datatype: of its elements.
        shape: of one sample; -1 is a dimension of any size.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class TakesTensors:
    """A handler whose samples clients can also send as tensors: those that `decode` makes of a file or a text.

    A subclass that overrides `decode` declares its own `tensor_inputs`; those that it inherits are not offered.
    """

    def tensor_inputs(self) -> tuple[TensorInput, ...]:
        """Return the tensors of a sample, in their order. Only the settings are loaded when this is called."""
        raise NotImplementedError

    def check_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        """Check the values of a sample's tensors. Their datatypes and shapes are right, and numbers are finite.

        Raises:
            RequestError: a value would make the module fail.
        """


def columns(handler: object) -> tuple[Column, ...]:
    """Return the columns of a handler's answers; none if a subclass overrides `encode` and does not declare its own."""
    return getattr(handler, "columns", ()) if is_current(handler, "columns", "encode") else ()


def tensor_inputs(handler: object) -> tuple[TensorInput, ...]:
    """Return the tensors that a handler takes; none if a subclass overrides `decode` and does not declare its own."""
    if isinstance(handler, TakesTensors) and is_current(handler, "tensor_inputs", "decode"):
        return handler.tensor_inputs()
    return ()


def is_current(handler: object, declaration: str, method: str) -> bool:
    """Return whether no subclass of the class that declares something overrides the method that it describes."""
    parts = (vars(each).keys() & {declaration, method} for each in type(handler).__mro__)
    return declaration in next(filter(None, parts), ())


def metadata(handler: Any) -> dict[str, Any]:
    """Return what the frontend answers about a model: its inputs and outputs. The handler needs only its settings."""
    files = [{"name": name, "datatype": BYTES, "shape": [-1]} for name in handler.Inputs.model_fields]
    answer = {"name": JSON, "datatype": BYTES, "shape": [-1]}
    return {
        "platform": PLATFORM,
        "inputs": files + [described(each) for each in tensor_inputs(handler)],
        "outputs": [described(each) for each in columns(handler)] + [answer],
    }


def described(tensor: Column | TensorInput) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape]}
