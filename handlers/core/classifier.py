"""Classifiers: the answer is a list of the most probable classes, with their labels."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from handlers.core import answers, inputs, settings, topk
from handlers.core.declared import Column
from handlers.core.errors import InvalidOption
from handlers.core.labelled import LabelledHandler
from handlers.core.outputs import Outputs, main_output
from handlers.core.request import Request
from handlers.core.settings import PositiveInt


class ClassifierHandler(LabelledHandler):
    """Serve a TorchScript module that returns [N, classes], or a tuple that begins with it.

    The answer is {"top_k": [{"label", "class", "probability"}, ...]}, best class first. A subclass declares `Inputs`,
    and defines `decode` and `example`.
    """

    class Settings(settings.Settings):
        top_k: PositiveInt = 5  # classes in an answer, unless the request has the option `top_k`
        outputs: Literal["logits", "probabilities"] = "logits"  # what the model returns

    class Options(inputs.Options):
        top_k: Annotated[PositiveInt | None, Field(description="How many classes the answer has.")] = None

    Answer = answers.Ranking
    settings: Settings
    columns: tuple[Column, ...] = (
        Column("label", "BYTES", ("top_k", "label")),
        Column("class", "INT64", ("top_k", "class")),
        Column("probability", "FP32", ("top_k", "probability")),
    )

    def read(self, row: dict, headers: Mapping) -> Request:
        request = super().read(row, headers)
        if isinstance(request.options, ClassifierHandler.Options) and request.options.top_k is not None:
            self.check_top_k(request.options.top_k)
        return request

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        return super().option_limits(labels) | {"top_k": {"maximum": len(labels)}}

    def check_top_k(self, top_k: int) -> None:
        """Check the number of classes that a request asks for.

        Raises:
            InvalidOption: the model has fewer classes.
        """
        if top_k > len(self.labels):
            raise InvalidOption(f"top_k must be between 1 and {len(self.labels)}, the number of classes.")

    def reduce(self, outputs: Outputs) -> Tensor:
        """Rank the classes: [N, classes] -> float32 [N, 2, classes], probabilities and class indices, best first."""
        return topk.rank(main_output(outputs), self.settings.outputs)

    def encode(self, row: Tensor, info: object, options: Options) -> dict:
        top_k = options.top_k or min(self.settings.top_k, len(self.labels))
        return {"top_k": topk.best_classes(row, top_k, self.labels)}

    def first(self, answer: Any) -> tuple[int, float | None]:
        best = answer["top_k"][0]
        return best["class"], best["probability"]
