"""Classifiers: the answer is a list of the most probable classes, with their labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor
from ts.context import Context

from handlers.core import inputs, settings, topk
from handlers.core.batch import BatchHandler
from handlers.core.errors import InvalidOption
from handlers.core.outputs import Outputs, main_output
from handlers.core.request import Request
from handlers.core.settings import PositiveInt

LABELS = "index_to_name.json"


class ClassifierHandler(BatchHandler):
    """Serve a TorchScript module that returns [N, classes], or a tuple that begins with it.

    The answer is {"top_k": [{"label", "class", "probability"}, ...]}, best class first. A subclass declares `Inputs`,
    and defines `decode` and `example`.
    """

    class Settings(settings.Settings):
        top_k: PositiveInt = 5  # classes in an answer, unless the request has the option `top_k`
        outputs: Literal["logits", "probabilities"] = "logits"  # what the model returns

    class Options(inputs.Options):
        top_k: PositiveInt | None = None

    settings: Settings

    def initialize(self, context: Context) -> None:
        """Load the labels with the model.

        Raises:
            FileNotFoundError: the archive has no index_to_name.json.
        """
        if not (Path(context.system_properties["model_dir"]) / LABELS).is_file():
            raise FileNotFoundError(f"the archive has no {LABELS}: a classifier needs its labels")
        super().initialize(context)
        self.labels = [self.mapping[str(index)] for index in range(len(self.mapping))]

    def read(self, row: dict, headers: Mapping) -> Request:
        request = super().read(row, headers)
        if isinstance(request.options, ClassifierHandler.Options) and request.options.top_k is not None:
            self.check_top_k(request.options.top_k)
        return request

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

    def describe(self) -> dict:
        return {**super().describe(), "labels": self.mapping}
