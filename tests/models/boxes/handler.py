"""A toy detector: any image -> the boxes of what is bright, in the original image's pixels."""

from typing import Annotated

import numpy
import torch
from pydantic import Field
from torch import Tensor

from handlers.core import inputs, settings
from handlers.core.batch import BatchHandler, Sample
from handlers.core.images import ImageLimits, open_image
from handlers.core.inputs import Image

SIDE = 64  # pixels that the model sees, down and across


class BoxesHandler(BatchHandler):
    """Model: uint8 [N, 1, 64, 64] -> {"boxes": float32 [N, 2, 4], "scores": float32 [N, 2]}."""

    class Settings(settings.Settings, ImageLimits):
        pass

    class Inputs(inputs.Inputs):
        data: Image

    class Options(inputs.Options):
        score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    def decode(self, inputs: Inputs) -> Sample:
        image = open_image(inputs.data, self.settings).convert("L")
        pixels = torch.from_numpy(numpy.array(image.resize((SIDE, SIDE))))
        return Sample(pixels.unsqueeze(0), info=image.size)

    def example(self) -> Sample:
        return Sample(torch.zeros(1, SIDE, SIDE, dtype=torch.uint8))

    def encode(self, row: dict[str, Tensor], info: tuple[int, int], options: Options) -> dict:
        scale = torch.tensor([*info, *info]) / SIDE
        found = [
            {"label": "bright", "score": score, "box": [round(x) for x in box.mul(scale).tolist()]}
            for box, score in zip(row["boxes"], row["scores"].tolist(), strict=True)
            if score >= options.score_threshold
        ]
        return {"detections": sorted(found, key=lambda each: -each["score"])}
