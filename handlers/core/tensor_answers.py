"""Answers of the Open Inference Protocol: tensors, as JSON or binary."""

import base64
import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from handlers.core import tensor_data
from handlers.core.declared import JSON, PICTURE, Column
from handlers.core.slots import Answer, Picture, Response, encode_json
from handlers.core.tensor_data import BYTES

BASE64 = "base64"
FILLERS: dict[str, object] = {BYTES: "", "INT64": -1}  # in place of what a shorter answer does not have; otherwise, 0


@dataclass(frozen=True)
class Respond:
    """Make the response of a request's answers.

    Attributes:
        model, version: of the model.
        id: the client's name for its request, if it has one.
        outputs: their names, and whether they are sent as binary tensors.
        columns: of the model.
    """

    model: str
    version: str
    id: str | None
    outputs: tuple[tuple[str, bool], ...]
    columns: tuple[Column, ...] = field(repr=False)

    def __call__(self, answers: list[Answer]) -> Response:
        """Raise a ValueError if an answer has a number that JSON does not have, as `encode_json` does."""
        document: dict[str, Any] = {"model_name": self.model, "model_version": self.version}
        if self.id is not None:
            document["id"] = self.id
        document["outputs"] = outputs = []
        contents = []
        for name, binary in self.outputs:
            datatype, shape, values = self.tensor(name, answers)
            output: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
            if binary:
                if datatype != BYTES:
                    encode_json(values)  # binary tensors must not have what JSON does not have
                contents.append(tensor_data.to_binary(datatype, values))
                output["parameters"] = {"binary_data_size": len(contents[-1])}
            elif name == PICTURE:
                output |= {
                    "parameters": {"content_type": BASE64},
                    "data": [base64.b64encode(v).decode() for v in values],
                }
            else:
                output["data"] = [each.decode() for each in values] if datatype == BYTES else values
            outputs.append(output)
        encoded = encode_json(document)
        if not contents:
            return Response(encoded)
        return Response(b"".join([encoded, *contents]), "application/octet-stream", len(encoded))

    def tensor(self, name: str, answers: list[Answer]) -> tuple[str, list[int], list]:
        """Return datatype, shape and elements of an output; those of BYTES are bytes."""
        if name == PICTURE:
            return BYTES, [len(answers)], [each.content for each in answers if isinstance(each, Picture)]
        if name == JSON:
            return BYTES, [len(answers)], [encode_json(each) for each in answers]
        column = next(each for each in self.columns if each.name == name)
        shape, elements = flattened([column.of(answer) for answer in answers], column)
        if column.datatype == BYTES:
            elements = [each.encode(errors="backslashreplace") for each in elements]
        return column.datatype, shape, elements


def flattened(rows: list, column: Column) -> tuple[list[int], list]:
    """Return shape and elements of a column. Shorter rows are filled up."""
    if not column.shape:
        return [len(rows)], rows
    longest, inner = max(map(len, rows)), column.shape[1:]
    filler = [FILLERS.get(column.datatype, 0)] * math.prod(inner)
    elements: list = []
    for row in rows:
        elements += chain.from_iterable(row) if inner else row
        elements += filler * (longest - len(row))
    return [len(rows), longest, *inner], elements
