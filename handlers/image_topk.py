"""Image classification: any image that Pillow opens -> the k most probable classes."""

from typing import Annotated, Literal

import numpy
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from handlers.core.batch import BatchHandler
from handlers.core.images import ImageSettings, flatten, open_image
from handlers.core.payload import Content, binary


class ImageTopKHandler(BatchHandler):
    """Model: uint8 [N, 3, crop, crop] (RGB; it normalises by itself) -> logits or probabilities [N, classes]."""

    class Settings(ImageSettings):
        """The geometry of the weights' own transforms, as torchvision's presets name it."""

        resize: Annotated[int, Field(gt=0)] = 256  # pixels of the shorter side
        crop: Annotated[int, Field(gt=0)] = 224  # pixels of the square out of the middle
        interpolation: Literal["bilinear", "bicubic"] = "bilinear"
        channels: Literal[1, 3] = 3

    def decode(self, content: Content) -> Tensor:
        """-> uint8 [channels, crop, crop]."""
        image = flatten(open_image(binary(content), self.settings))
        if self.settings.channels == 1:
            image = image.convert("L")
        image = resize_and_crop(image, self.settings.resize, self.settings.crop, self.settings.interpolation)
        pixels = torch.from_numpy(numpy.array(image))
        return pixels.unsqueeze(0) if self.settings.channels == 1 else pixels.permute(2, 0, 1)

    def example(self) -> Tensor:
        return torch.zeros(self.settings.channels, self.settings.crop, self.settings.crop, dtype=torch.uint8)


def resize_and_crop(image: Image.Image, resize: int, crop: int, interpolation: str) -> Image.Image:
    """As torchvision's `ImageClassification` preset does on Pillow images: the shorter side to `resize` pixels, then
    the `crop` x `crop` pixels of the middle, black outside."""
    width, height = image.size
    if width <= height:
        size = (resize, int(resize * height / width))
    else:
        size = (int(resize * width / height), resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    # torchvision pads by floor division before it crops, and rounds the crop's corner as round() does
    left, top = (round_half_even(size[0] - crop), round_half_even(size[1] - crop))
    return image.crop((left, top, left + crop, top + crop))


def round_half_even(excess: int) -> int:
    """The corner of a centred crop: half of the excess; where the image is smaller, half of what is padded."""
    return round(excess / 2) if excess >= 0 else -((-excess) // 2)
