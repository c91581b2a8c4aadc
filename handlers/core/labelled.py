"""Handlers of models whose classes have labels: classifiers, detectors, segmenters."""

from pathlib import Path

from ts.context import Context

from handlers.core.batch import BatchHandler

LABELS = "index_to_name.json"


class LabelledHandler(BatchHandler):
    """Serve a module whose archive carries the labels of its classes.

    Attributes:
        labels: by class index.
    """

    labels: list[str]

    def initialize(self, context: Context) -> None:
        """Load the labels with the model.

        Raises:
            FileNotFoundError: the archive has no index_to_name.json.
        """
        if not (Path(context.system_properties["model_dir"]) / LABELS).is_file():
            raise FileNotFoundError(f"the archive has no {LABELS}: {type(self).__name__} needs its labels")
        super().initialize(context)
        self.labels = [self.mapping[str(index)] for index in range(len(self.mapping))]

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        """Return how settings and labels limit the options, by name, in the words of JSON Schema; only for the schema.

        Args:
            labels: by class index. An archive is described before `labels` is loaded.
        """
        return {}

    def describe(self) -> dict:
        return {**super().describe(), "labels": self.mapping}
