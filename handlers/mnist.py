"""Classify an image of one handwritten digit: the three most probable classes."""

import torch
from torch import Tensor
from typing_extensions import TypedDict

from handlers.core import answers, inputs, topk
from handlers.core.batch import Sample
from handlers.core.declared import Column, TakesTensors, TensorInput
from handlers.core.digits import SIDE, read_digit
from handlers.core.errors import InvalidOption
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.heatmaps import explainable_image
from handlers.core.images import ImageLimits
from handlers.core.inputs import Image

TOP_K = 3


class MNISTHandler(ExplainedClassifier, TakesTensors):
    """Model: uint8 [N, 1, 28, 28] (bright ink on black; it normalises itself) -> logits [N, 10].

    The answer has its own names, which clients of TorchServe's MNIST example know.
    """

    class Settings(ExplainedClassifier.Settings, ImageLimits):
        pass

    settings: Settings
    columns = (
        Column("top_3_classes", "INT64", ("top_3_classes",), (TOP_K,)),
        Column("top_3_probabilities", "FP32", ("top_3_probabilities",), (TOP_K,)),
    )

    class Inputs(inputs.Inputs):
        data: Image

    class Answer(TypedDict):
        """The most probable classes, best first, and their probabilities."""

        top_3_classes: list[int]
        top_3_probabilities: list[float]

    ExplainAnswer = answers.ImageExplanation

    def decode(self, inputs: Inputs) -> Sample:
        """Decode an image file into pixels as in MNIST, uint8 [1, 28, 28]; `info` is their place in the image."""
        return Sample(*read_digit(inputs.data, self.settings))

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        return super().option_limits(labels) | {"top_k": {"const": TOP_K}}

    def tensor_inputs(self) -> tuple[TensorInput, ...]:
        return (TensorInput("pixels", "UINT8", (1, SIDE, SIDE)),)

    def check_top_k(self, top_k: int) -> None:
        if top_k != TOP_K:
            raise InvalidOption(f"top_k must be {TOP_K}: this model always returns its {TOP_K} most probable classes.")

    def encode(self, row: Tensor, info: object, options: ExplainedClassifier.Options) -> dict:
        best = topk.best_classes(row, TOP_K, self.labels)
        return {
            "top_3_classes": [entry["class"] for entry in best],
            "top_3_probabilities": [entry["probability"] for entry in best],
        }

    def first(self, answer: Answer) -> tuple[int, float | None]:
        return answer["top_3_classes"][0], answer["top_3_probabilities"][0]

    def example(self) -> Sample:
        return Sample(torch.zeros(1, SIDE, SIDE, dtype=torch.uint8))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with paper without ink."""
        return explainable_image(sample, torch.zeros(1, SIDE, SIDE), self.settings)
