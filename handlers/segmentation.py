"""Segment an image file: the class of each pixel."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, NamedTuple, cast

import numpy
import torch
from PIL import Image as PillowImage
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import TypedDict

from handlers.core import answers, device, inputs, masks, settings
from handlers.core.batch import Sample
from handlers.core.errors import ImageTooLarge, InvalidOption, ServingError, input_too_large
from handlers.core.explain import Explainable, ExplainedHandler
from handlers.core.heatmaps import explainable_image
from handlers.core.images import ImageLimits, flatten, open_image, open_upright, resized
from handlers.core.inputs import Image
from handlers.core.outputs import Outputs, main_output
from handlers.core.request import Request
from handlers.core.settings import NaturalInt, PositiveInt
from handlers.core.slots import Picture

CELLS = 16  # squares along a side that an explanation removes together
STEPS = (12, 50)  # of integrated gradients: a step on a tile takes as long as many on a small image


def attempt(step: Callable[[], Tensor | None]) -> Tensor | ServingError | None:
    """Return what a step of the blending returns. If the image does not fit into memory, return its error."""
    try:
        return step()
    except ServingError as error:
        return error
    except Exception as exc:
        if not device.is_out_of_memory(exc):
            raise
        return input_too_large()


class SegmentationHandler(ExplainedHandler):
    """Serve a segmenter.

    Model: uint8 [N, channels, tile, tile] -> logits [N, classes, tile, tile], or a dict whose "out" they are, as
    torchvision's segmenters return it.
    """

    class Settings(settings.Settings, ImageLimits):
        max_pixels: Annotated[int, Field(gt=0)] = 16_000_000  # width x height; the answer has a mask of this size
        resize: PositiveInt | None = None  # pixels of the shorter side; None: the image keeps its size
        interpolation: Literal["bilinear", "bicubic"] = "bilinear"
        channels: Literal[1, 3] = 3
        tile: PositiveInt = 520  # side of the model's input, in pixels
        overlap: NaturalInt = 64  # least overlap of two tiles, in pixels
        max_tiles: PositiveInt = 32  # of one image
        blank: Literal["mean", "shuffled"] = "mean"  # what an explanation puts in the place of pixels

        @model_validator(mode="after")
        def check_overlap(self) -> "SegmentationHandler.Settings":
            if 2 * self.overlap > self.tile:
                raise ValueError("overlap must be at most half of tile")
            return self

    class Inputs(inputs.Inputs):
        data: Image

    class Options(inputs.PictureOptions):
        overlay: Annotated[bool, Field(description="With format=png: the mask laid over the image.")] = False

    class Answer(TypedDict):
        """The classes in the image, the largest first, and the class index of each pixel."""

        classes: list[answers.SegmentedClass]
        mask: answers.Base64PNG
        size: Annotated[list[int], Field(min_length=2, max_length=2, description="width and height")]

    ExplainAnswer = answers.ImageExplanation

    class Info(NamedTuple):
        """What stays with a request: the image's original size, its size at the model's scale, and its file."""

        size: tuple[int, int]
        scaled: tuple[int, int]
        content: bytes

    settings: Settings

    def initialize(self, context) -> None:
        super().initialize(context)
        if len(self.labels) > masks.MAX_CLASSES:
            raise ValueError(f"the model has {len(self.labels)} classes; a mask has at most {masks.MAX_CLASSES}")

    def read(self, row: dict, headers: Mapping) -> Request:
        request = super().read(row, headers)
        options = request.options
        if isinstance(options, SegmentationHandler.Options) and options.overlay and options.format != "png":
            raise InvalidOption('The option "overlay" needs "format": "png".')
        return request

    def decode(self, inputs: Inputs) -> Sample:
        """Decode an image file into pixels, uint8 [channels, H, W], at the model's scale; no side is below a tile."""
        image, size = open_upright(inputs.data, self.settings, enough=self.settings.resize)
        image = flatten(image)
        scaled = resized(size, self.settings.resize) if self.settings.resize else size
        self.check_tiles(scaled)
        if scaled != image.size:
            image = image.resize(scaled, PillowImage.Resampling[self.settings.interpolation.upper()])
        if self.settings.channels == 1:
            image = image.convert("L")
        pixels = torch.from_numpy(masks.pad(numpy.array(image), self.settings.tile))
        return Sample(
            pixels.unsqueeze(0) if self.settings.channels == 1 else pixels.permute(2, 0, 1),
            info=self.Info(size, scaled, inputs.data),
        )

    def check_tiles(self, size: tuple[int, int]) -> None:
        """Check the number of tiles, before the image is resized.

        Raises:
            ImageTooLarge: it exceeds `max_tiles`.
        """
        tile, overlap = self.settings.tile, self.settings.overlap
        across, down = (len(masks.starts(max(side, tile), tile, overlap)) for side in size)
        if across * down > self.settings.max_tiles:
            scale = ", resized for the model," if self.settings.resize else ""
            raise ImageTooLarge(
                f"The image is too large: with {size[0]} x {size[1]} pixels{scale} it has {across * down} tiles of "
                f"{tile} x {tile} pixels; at most {self.settings.max_tiles} are accepted. Send it in parts."
            )

    def example(self) -> Sample:
        shape = (self.settings.channels, self.settings.tile, self.settings.tile)
        return Sample(torch.zeros(shape, dtype=torch.uint8))

    def reduce(self, outputs: Outputs) -> Tensor:
        return outputs["out"] if isinstance(outputs, dict) else main_output(outputs)

    @torch.inference_mode()
    def predict(self, samples: list[Sample]) -> list[object]:
        """Run the tiles of all images in common batches, and make a mask of each image.

        The scores stay on the device, and only those of one batch and one or two images at a time.

        Returns:
            for each sample, its mask, uint8 [H, W] at the model's scale; or the ServingError of a sample that failed.
        """
        weights = masks.window(self.settings.tile, self.settings.overlap, self.device)
        answers: list[object] = [None] * len(samples)
        blends: dict[int, masks.Blend] = {}
        for index, top, left, scores in self.scored_tiles(samples):
            for finished in [each for each in blends if each != index]:
                answers[finished] = attempt(blends.pop(finished).mask)
            if answers[index] is None and not isinstance(scores, ServingError):
                size = samples[index].tensors.shape[-2:]  # type: ignore[union-attr]  # decode makes one tensor
                blend = blends.setdefault(index, masks.Blend(size, weights))
                answers[index] = attempt(partial(blend.add, scores, top, left))
            elif isinstance(scores, ServingError):
                answers[index] = scores
            if answers[index] is not None:
                blends.pop(index, None)
        for index, blend in blends.items():
            answers[index] = attempt(blend.mask)
        return answers

    def scored_tiles(self, samples: list[Sample]) -> Iterator[tuple[int, int, int, Tensor | ServingError]]:
        """Yield the index of the sample, the top, the left and the scores of every tile, in order."""
        tile = self.settings.tile
        places = [
            (index, top, left)
            for index, sample in enumerate(samples)
            for top, left in masks.corners(sample.tensors.shape, tile, self.settings.overlap)  # type: ignore[union-attr]
        ]
        for start in range(0, len(places), self.run_size):
            batch = places[start : start + self.run_size]
            cut = [
                Sample(samples[index].tensors[:, top : top + tile, left : left + tile])  # type: ignore[call-overload]
                for index, top, left in batch
            ]
            rows = [row for part in self.run(cut) for row in ([part] if isinstance(part, ServingError) else part)]
            for place, row in zip(batch, rows, strict=True):
                yield *place, row

    def encode(self, row: Tensor, info: Info, options: Options) -> dict | Picture:
        width, height = info.scaled
        mask = PillowImage.fromarray(row[:height, :width].contiguous().numpy())
        if mask.size != info.size:
            mask = mask.resize(info.size, PillowImage.Resampling.NEAREST)
        if options.format == "png" and options.overlay:
            image = flatten(open_image(info.content, self.settings))
            return Picture(masks.png(masks.overlay(image, mask, self.labels)))
        if options.format == "png":
            return Picture(masks.png(masks.coloured(mask)))
        classes = masks.shares(mask, self.labels)
        return {"classes": classes, "mask": masks.base64_png(mask), "size": list(info.size)}

    def predicted(self, score: Tensor, baseline_score: Tensor) -> int:
        """Return the class that gains most over the baseline."""
        return int((score - baseline_score).argmax())

    def explainable(self, sample: Sample) -> Explainable:
        """Explain the mean probability of a class over the pixels. Of a larger image, this is its central tile."""
        pixels, tile = cast("Tensor", sample.tensors), self.settings.tile
        top, left = ((side - tile) // 2 for side in pixels.shape[1:])
        pixels = pixels[:, top : top + tile, left : left + tile]
        width, height = cast("SegmentationHandler.Info", sample.info).scaled if sample.info else (tile, tile)
        place = (left / width, top / height, (left + tile) / width, (top + tile) / height)

        def class_scores(outputs: Outputs) -> Tensor:
            return self.reduce(outputs).float().softmax(1)[:, :, :height, :width].mean((2, 3))

        blank = shuffled(pixels).float() if self.settings.blank == "shuffled" else mean_colour(pixels, height, width)
        image = explainable_image(Sample(pixels, place, sample.inputs), blank, self.settings, cells=CELLS)
        return replace(image, class_scores=class_scores, steps=STEPS)


def mean_colour(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return pixels, float32 [C, H, W], that all have the mean colour of the upper left [C, height, width]."""
    return pixels[:, :height, :width].float().mean((1, 2), keepdim=True).expand(pixels.shape)


def shuffled(pixels: Tensor) -> Tensor:
    """Return the pixels, [C, H, W], in an order that is random, and the same for all images of a size."""
    order = torch.randperm(pixels[0].numel(), generator=torch.Generator().manual_seed(0))
    return pixels.flatten(1)[:, order].view_as(pixels)
