"""Classify an image file: the k most probable classes."""

from typing import Annotated, Literal, cast

import numpy
import torch
from PIL import Image as PillowImage
from pydantic import Field
from torch import Tensor

from handlers.core import answers, inputs
from handlers.core.batch import Sample
from handlers.core.declared import TakesTensors, TensorInput
from handlers.core.errors import ImageTooLarge
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.heatmaps import explainable_image
from handlers.core.images import ImageLimits, flatten, open_image, resized
from handlers.core.inputs import Image


class ImageTopKHandler(ExplainedClassifier, TakesTensors):
    """Model: uint8 [N, 3, crop, crop] (RGB; it normalises itself) -> logits or probabilities [N, classes]."""

    class Settings(ExplainedClassifier.Settings, ImageLimits):
        """The geometry of the transforms that belong to the weights, with the names of torchvision's presets."""

        resize: Annotated[int, Field(gt=0)] = 256  # pixels of the shorter side
        crop: Annotated[int, Field(gt=0)] = 224  # side of the central square, in pixels
        interpolation: Literal["bilinear", "bicubic"] = "bilinear"
        channels: Literal[1, 3] = 3

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Image

    ExplainAnswer = answers.ImageExplanation

    def decode(self, inputs: Inputs) -> Sample:
        """Decode an image file into pixels, uint8 [channels, crop, crop]; `info` is their place in the image."""
        image = flatten(open_image(inputs.data, self.settings, enough=self.settings.resize))
        width, height = resized(image.size, self.settings.resize)
        if width * height > self.settings.max_pixels:
            raise ImageTooLarge(
                f"The image is too elongated: resized for the model, it would have {width} x {height} pixels; at most "
                f"{self.settings.max_pixels} pixels (width x height) are accepted."
            )
        if self.settings.channels == 1:
            image = image.convert("L")
        image = resize_and_crop(image, self.settings.resize, self.settings.crop, self.settings.interpolation)
        pixels = torch.from_numpy(numpy.array(image))
        left, top = corner(width, self.settings.crop) / width, corner(height, self.settings.crop) / height
        place = (left, top, left + self.settings.crop / width, top + self.settings.crop / height)
        return Sample(pixels.unsqueeze(0) if self.settings.channels == 1 else pixels.permute(2, 0, 1), place)

    def tensor_inputs(self) -> tuple[TensorInput, ...]:
        return (TensorInput("pixels", "UINT8", (self.settings.channels, self.settings.crop, self.settings.crop)),)

    def example(self) -> Sample:
        return Sample(torch.zeros(self.settings.channels, self.settings.crop, self.settings.crop, dtype=torch.uint8))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with an image of the mean colour: it shows nothing, and is as bright as the original."""
        pixels = cast("Tensor", sample.tensors).float()
        return explainable_image(sample, pixels.mean((1, 2), keepdim=True).expand_as(pixels), self.settings)


def resize_and_crop(image: PillowImage.Image, resize: int, crop: int, interpolation: str) -> PillowImage.Image:
    """Resize the shorter side to `resize` pixels, and cut out the central `crop` x `crop` pixels, black outside.

    The result is that of torchvision's `ImageClassification` preset on Pillow images.
    """
    size = resized(image.size, resize)
    if size != image.size:
        image = image.resize(size, PillowImage.Resampling[interpolation.upper()])
    left, top = (corner(side, crop) for side in size)
    return image.crop((left, top, left + crop, top + crop))


def corner(side: int, crop: int) -> int:
    """Return where the crop starts along one side, rounded as torchvision does: a half to even, half a padding down."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
