"""Image classification: an image file -> the k most probable classes."""

from typing import Annotated, Literal

import numpy
import torch
from PIL import Image as PillowImage
from pydantic import Field

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.classifier import ClassifierHandler
from handlers.core.errors import ImageTooLarge
from handlers.core.images import ImageLimits, flatten, open_image
from handlers.core.inputs import Image


class ImageTopKHandler(ClassifierHandler):
    """Model: uint8 [N, 3, crop, crop] (RGB; it normalises by itself) -> logits or probabilities [N, classes]."""

    class Settings(ClassifierHandler.Settings, ImageLimits):
        """The geometry of the weights' own transforms, as torchvision's presets name it."""

        resize: Annotated[int, Field(gt=0)] = 256  # pixels of the shorter side
        crop: Annotated[int, Field(gt=0)] = 224  # pixels of the square out of the middle
        interpolation: Literal["bilinear", "bicubic"] = "bilinear"
        channels: Literal[1, 3] = 3

    class Inputs(inputs.Inputs):
        data: Image

    def decode(self, inputs: Inputs) -> Sample:
        """Make pixels, uint8 [channels, crop, crop]."""
        image = flatten(open_image(inputs.data, self.settings, enough=self.settings.resize))
        width, height = resized(image.size, self.settings.resize)
        if width * height > self.settings.max_pixels:
            raise ImageTooLarge(f"The image is too long: resized, it would have {width} x {height} pixels.")
        if self.settings.channels == 1:
            image = image.convert("L")
        image = resize_and_crop(image, self.settings.resize, self.settings.crop, self.settings.interpolation)
        pixels = torch.from_numpy(numpy.array(image))
        return Sample(pixels.unsqueeze(0) if self.settings.channels == 1 else pixels.permute(2, 0, 1))

    def example(self) -> Sample:
        return Sample(torch.zeros(self.settings.channels, self.settings.crop, self.settings.crop, dtype=torch.uint8))


def resize_and_crop(image: PillowImage.Image, resize: int, crop: int, interpolation: str) -> PillowImage.Image:
    """As torchvision's `ImageClassification` preset does on Pillow images: the shorter side to `resize` pixels, then
    the `crop` x `crop` pixels of the middle, black outside.
    """
    size = resized(image.size, resize)
    if size != image.size:
        image = image.resize(size, PillowImage.Resampling[interpolation.upper()])
    left, top = (corner(side, crop) for side in size)
    return image.crop((left, top, left + crop, top + crop))


def resized(size: tuple[int, int], resize: int) -> tuple[int, int]:
    """Width and height, once the shorter of them is `resize`."""
    width, height = size
    return (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)


def corner(side: int, crop: int) -> int:
    """Where the crop starts. As torchvision rounds: a middle to even, half of what is padded down."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
