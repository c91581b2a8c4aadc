"""A regression: a JSON object of numbers -> a number."""

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from typing_extensions import TypedDict

from handlers.core import inputs
from handlers.core.batch import BatchHandler, Sample


class PriceHandler(BatchHandler):
    """Model: float32 [N, 3] (rooms, area, age) -> float32 [N, 1]."""

    class Inputs(inputs.Inputs):
        class House(BaseModel, allow_inf_nan=False):
            rooms: int = Field(gt=0)
            area: float  # m2
            age: float = 0  # years

        data: House

    class Answer(TypedDict):
        price: float

    def decode(self, inputs: Inputs) -> Sample:
        house = inputs.data
        return Sample(torch.tensor([float(house.rooms), house.area, house.age]))

    def example(self) -> Sample:
        return Sample(torch.ones(3))

    def encode(self, row: Tensor, info: object, options: object) -> dict:
        return {"price": row.item()}
