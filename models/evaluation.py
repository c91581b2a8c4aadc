"""The figures of a classifier (TorchMetrics), as they stand in metrics.json."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from models.training import Batches


def answers(classes: int) -> MetricCollection:
    """Return the metrics of the class that ranks first; in the confusion matrix, a row is a true class."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
            "confusion_matrix": MulticlassConfusionMatrix(classes),
        }
    )


def rankings(classes: int) -> MetricCollection:
    """Return the metrics of the probabilities at all thresholds.

    Of two classes, the second one is ranked against the first. Of more, each is ranked against the rest, and the
    figures are averaged.
    """
    if classes == 2:
        return MetricCollection({"auroc": BinaryAUROC(), "average_precision": BinaryAveragePrecision()})
    return MetricCollection(
        {"macro_auroc": MulticlassAUROC(classes), "macro_average_precision": MulticlassAveragePrecision(classes)}
    )


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], classes: int) -> dict:
    """Measure `model` on `batches`.

    Returns:
        "accuracy", "macro_f1", "confusion_matrix", and the area under the ROC curve and the average precision: "auroc"
        and "average_precision" of two classes, "macro_auroc" and "macro_average_precision" of more.
    """
    first, ranked = answers(classes), rankings(classes)
    model.eval()
    for *inputs, target in batches:
        logits = model(*inputs)
        first.update(logits, target)
        probabilities = logits.softmax(dim=1)
        ranked.update(probabilities[:, 1] if classes == 2 else probabilities, target)
    values = first.compute()
    matrix = values.pop("confusion_matrix").tolist()
    figures = {name: round(value.item(), 5) for name, value in {**values, **ranked.compute()}.items()}
    return figures | {"confusion_matrix": matrix}


def measure(model: nn.Module, test: tuple[Tensor, Tensor], altered: dict[str, Tensor], classes: int) -> dict:
    """Evaluate a model on the test split, and on altered inputs.

    Args:
        model: to evaluate.
        test: inputs and targets of the test split.
        altered: {name of the alteration: the altered inputs}.
        classes: the number of classes.

    Returns:
        what `evaluate` returns for the test split, and as "accuracy_under" the accuracy for each alteration.
    """

    def evaluate_on(inputs: Tensor) -> dict:
        return evaluate(model, Batches(inputs, test[1], batch_size=200, shuffle=False), classes)

    return evaluate_on(test[0]) | {
        "accuracy_under": {name: evaluate_on(inputs)["accuracy"] for name, inputs in altered.items()}
    }
