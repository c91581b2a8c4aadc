"""Detect objects in an image file: their classes, boxes, and masks or keypoints where the model has them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal, cast

import numpy
import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import TypedDict

from handlers.core import answers, boxes, boxes_explained, inputs, settings
from handlers.core.batch import Sample
from handlers.core.boxes import Detections, Format, Placement
from handlers.core.declared import Column
from handlers.core.errors import InvalidOption, NonFiniteOutput
from handlers.core.explain import Explainable, ExplainedHandler
from handlers.core.heatmaps import explainable_image
from handlers.core.images import WHOLE, ImageLimits, flatten, open_image, open_upright
from handlers.core.inputs import Image
from handlers.core.outputs import Outputs, main_output
from handlers.core.precision import Precision
from handlers.core.request import Request
from handlers.core.settings import PositiveInt
from handlers.core.slots import Picture

Share = Annotated[float, Field(ge=0, le=1)]
NOTHING = "none"  # counted for an image without detections


class DetectionHandler(ExplainedHandler):
    """Serve a detector.

    Model, by the setting `format`:
    - torchvision: (uint8 [N, 3, H, W] padded at the right and at the bottom, int64 [N, 2] heights and widths) -> for
      each image a dict of boxes [K, 4], scores [K], labels [K], and perhaps masks or keypoints
    - yolo: uint8 [N, 3, *size] -> [N, 4 + classes, A]; yolov5: -> [N, A, 5 + classes]
    """

    class Settings(settings.Settings, ImageLimits):
        format: Format = "torchvision"
        longest_side: PositiveInt = 1333  # pixels; torchvision: a larger image is reduced before it is copied
        size: tuple[PositiveInt, PositiveInt] = (640, 640)  # height and width of YOLO's input
        score_threshold: Share = 0.3  # of an answer, unless the request has the option
        max_detections: PositiveInt = 100  # of an answer; a request may ask for fewer
        iou_threshold: Share = 0.5  # YOLO: overlap above which the worse of two boxes of a class is dropped
        max_picture_pixels: PositiveInt = 4_000_000  # of an answer with format=png; a larger image is reduced
        # Not "auto", because rounding changes detections: only for a model that was measured in it
        precision: Literal["float32", "bfloat16", "float16"] | list[Precision] = "float32"

        @model_validator(mode="after")
        def check_precision(self) -> "DetectionHandler.Settings":
            if isinstance(self.precision, list) and self.format == "torchvision":
                raise ValueError(
                    "precision must be one name with the format torchvision: its outputs differ in number, so that "
                    "precisions cannot be compared by them"
                )
            return self

    class Inputs(inputs.Inputs):
        data: Image

    class Options(inputs.PictureOptions):
        score_threshold: Annotated[Share | None, Field(description="The lowest score of a detection.")] = None
        max_detections: Annotated[PositiveInt | None, Field(description="The most detections of the answer.")] = None

    class Answer(TypedDict):
        """The objects in the image, best first."""

        detections: list[answers.Detection]

    ExplainAnswer = answers.ImageExplanation

    settings: Settings
    columns = (
        Column("label", "BYTES", ("detections", "label")),
        Column("class", "INT64", ("detections", "class")),
        Column("score", "FP32", ("detections", "score")),
        Column("box", "FP32", ("detections", "box"), (-1, 4)),
    )
    least_score = boxes.MIN_SCORE

    def read(self, row: dict, headers: Mapping) -> Request:
        """Read a request, and check its options.

        Raises:
            RequestError: the request is malformed, or asks for more detections than the setting allows.
        """
        request = super().read(row, headers)
        options = request.options
        asked = options.max_detections if isinstance(options, DetectionHandler.Options) else None
        if asked is not None and asked > self.settings.max_detections:
            raise InvalidOption(f"max_detections must be between 1 and {self.settings.max_detections}.")
        return request

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        return super().option_limits(labels) | {"max_detections": {"maximum": self.settings.max_detections}}

    def decode(self, inputs: Inputs) -> Sample:
        """Decode an image file into pixels, uint8 [3, H, W]; `info` is its `Placement` and the file."""
        raw = self.settings.format == "torchvision"
        height, width = (self.settings.longest_side,) * 2 if raw else self.settings.size
        image, size = open_upright(inputs.data, self.settings, enough=min(height, width))
        if raw:
            image, placement = boxes.fit(flatten(image), size, (width, height), enlarge=False)
        else:
            image, placement = boxes.letterbox(flatten(image), size, (width, height))
        return Sample(torch.from_numpy(numpy.array(image)).permute(2, 0, 1), info=(placement, inputs.data))

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        if self.settings.format == "torchvision":
            return boxes.stack_padded([cast("Tensor", sample.tensors) for sample in samples])
        return super().collate(samples)

    def example(self) -> Sample:
        height, width = (480, 640) if self.settings.format == "torchvision" else self.settings.size
        return Sample(torch.zeros(3, height, width, dtype=torch.uint8))

    def reduce(self, outputs: Outputs) -> Detections:
        """Make one row of detections per image, best first, padded to the longest."""
        if self.settings.format != "torchvision":
            raw = main_output(outputs)
            outputs = boxes.decode_yolo(raw, self.settings.format, len(self.mapping), self.settings.iou_threshold)
        if not isinstance(outputs, list):
            raise TypeError(f"the model returns a {type(outputs).__name__}; the format torchvision is a list of dicts")
        rows = boxes.stack_detections(outputs, self.settings.max_detections)
        if rows["labels"].numel() and (highest := int(rows["labels"].max())) >= len(self.mapping):
            raise ValueError(
                f"the model returns the class {highest}; index_to_name.json has {len(self.mapping)} labels"
            )
        return rows

    def encode(self, row: Detections, info: tuple[Placement, bytes], options: Options) -> dict | Picture:
        placement, content = info
        if not all(row[name].isfinite().all() for name in ("boxes", "scores")):
            raise NonFiniteOutput("The model's output for this input is not a finite number.")
        threshold = self.settings.score_threshold if options.score_threshold is None else options.score_threshold
        kept = row["scores"] >= threshold
        row = {name: values[kept][: options.max_detections] for name, values in row.items()}
        if options.format == "png":
            image = flatten(open_image(content, self.settings))
            from handlers.core import boxes_drawn  # imports much; see boxes.load_operators

            return Picture(boxes_drawn.draw(image, row, placement, self.labels, self.settings.max_picture_pixels))
        return {"detections": boxes.describe(row, placement, self.labels)}

    def first(self, answer: Answer) -> tuple[int, float | None]:
        """Return the class of the best detection, and its score; or the last outcome, if nothing was found."""
        found = answer["detections"]
        return (found[0]["class"], found[0]["score"]) if found else (len(self.labels), None)

    def outcomes(self) -> list[str]:
        return [*self.labels, NOTHING]

    def explainable(self, sample: Sample) -> Explainable:
        """Follow the best box of each class; compare with an image of the mean colour."""
        kind, classes = self.settings.format, len(self.labels)
        pixels = cast("Tensor", sample.tensors)
        size = torch.tensor([pixels.shape[1:]], device=self.device)

        def arguments(images: Tensor) -> tuple[Tensor, ...]:
            return (images, size.expand(len(images), -1)) if kind == "torchvision" else (images,)

        def class_scores(outputs: Outputs) -> Tensor:
            found = boxes_explained.candidates(outputs, kind, classes)
            return torch.stack([boxes_explained.scores_at(explained, *each) for each in found])

        with torch.no_grad():
            outputs = self.original(*arguments(pixels[None].float().to(self.device)))
            [found] = boxes_explained.candidates(outputs, kind, classes)
            explained = boxes_explained.best_boxes(*found)
        place, corners = WHOLE, None
        if sample.info:
            placement, _ = cast("tuple[Placement, bytes]", sample.info)
            place = placement.shares((pixels.size(2), pixels.size(1)))
            corners = [boxes.rounded(each) for each in placement.restore(explained.cpu().view(-1, 2, 2)).flatten(1)]
        blank = pixels.float().mean((1, 2), keepdim=True).expand(pixels.shape)
        image = explainable_image(Sample(pixels, place, sample.inputs), blank, self.settings)
        image = replace(image, arguments=arguments, class_scores=class_scores, boxes=corners)
        return replace(image, preferred="feature_ablation")  # gradients need hundreds of steps until they add up
