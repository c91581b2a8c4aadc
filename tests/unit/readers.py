"""Declarations of inputs and options, and their readers, for the tests of requests."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from handlers.core import inputs
from handlers.core.classifier import ClassifierHandler
from handlers.core.inputs import Image, Sound, Text
from handlers.core.request import Request, RequestReader

MAX_INSTANCES = 4
JSON = {"Content-Type": "application/json; charset=utf-8"}  # TorchServe does not parse JSON with a charset
BASE64 = "aGVsbG8="  # of b"hello"


class OneText(inputs.Inputs):
    data: Text


class OneImage(inputs.Inputs):
    data: Image


class House(BaseModel):
    rooms: int
    area: float


class OneHouse(inputs.Inputs):
    data: House


class Several(inputs.Inputs):
    image: Image
    caption: Text
    audio: Sound | None = None


class Detection(inputs.Options):
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_detections: Annotated[int, Field(gt=0, le=100)] = 10
    method: Literal["fast", "exact"] = "fast"
    crowd: bool = False


TopK = ClassifierHandler.Options
texts, images = RequestReader(OneText, TopK, MAX_INSTANCES), RequestReader(OneImage, TopK, MAX_INSTANCES)
houses = RequestReader(OneHouse, inputs.Options, MAX_INSTANCES)
several = RequestReader(Several, Detection, MAX_INSTANCES)


def request_for(*values: str, top_k: int | None = None, many: bool = False) -> Request:
    return Request([OneText(data=value) for value in values], TopK(top_k=top_k), many)
