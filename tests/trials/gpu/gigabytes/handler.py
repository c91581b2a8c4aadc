"""A number of MiB -> the same number, after the device had to provide them for a moment."""

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import BatchHandler, Sample


class GigabytesHandler(BatchHandler):
    """Model: int64 [N, 1] -> float32 [N, 1]."""

    class Inputs(inputs.Inputs):
        class Amount(BaseModel):
            mib: int = Field(gt=0)

        data: Amount

    def decode(self, inputs: Inputs) -> Sample:
        return Sample(torch.tensor([inputs.data.mib]))

    def example(self) -> Sample:
        return Sample(torch.ones(1, dtype=torch.int64))

    def encode(self, row: Tensor, info: object, options: object) -> dict:
        return {"mib": row.item()}
