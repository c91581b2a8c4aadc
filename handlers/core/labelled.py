"""Handlers of models whose classes have labels: classifiers, detectors, segmenters."""

from pathlib import Path
from typing import Any

from ts.context import Context

from handlers.core.batch import BatchHandler
from handlers.core.declared import is_current
from handlers.core.errors import missing_method
from handlers.core.predictions import REFERENCE_NAME, Reference

LABELS = "index_to_name.json"


class LabelledHandler(BatchHandler):
    """Serve a module whose archive carries the labels of its classes.

    Attributes:
        labels: by class index.
    """

    labels: list[str]

    def initialize(self, context: Context) -> None:
        """Load the labels with the model, and count what it predicts.

        Raises:
            FileNotFoundError: the archive has no index_to_name.json.
            pydantic.ValidationError: its reference.json is invalid.
        """
        folder = Path(context.system_properties["model_dir"])
        if not (folder / LABELS).is_file():
            raise FileNotFoundError(f"the archive has no {LABELS}: {type(self).__name__} needs its labels")
        super().initialize(context)
        self.labels = [self.mapping[str(index)] for index in range(len(self.mapping))]
        if self.settings.counted_classes and is_current(self, "first", "encode"):
            recorded = folder / REFERENCE_NAME
            reference = Reference.model_validate_json(recorded.read_bytes()) if recorded.is_file() else None
            self.metrics.watch(self.first, self.outcomes(), self.settings.counted_classes, reference)

    def first(self, answer: Any) -> tuple[int, float | None]:
        """Return the outcome that comes first in an answer of `encode`, and its confidence; None if it has none.

        The outcome is an index into `outcomes`. A subclass that overrides `encode` also overrides this method;
        otherwise, its predictions are not counted.
        """
        raise missing_method(self, "first")

    def outcomes(self) -> list[str]:
        """Return the labels of what can come first in an answer; by default, those of the classes."""
        return self.labels

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        """Return how settings and labels limit the options, by name, in the words of JSON Schema; only for the schema.

        Args:
            labels: by class index. An archive is described before `labels` is loaded.
        """
        return {}

    def describe(self) -> dict:
        return {**super().describe(), "labels": self.mapping}
