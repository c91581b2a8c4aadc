"""Outputs of a classifier -> ranked classes: on the device for the whole batch, then one copy to the host."""

import math

import torch
from torch import Tensor

from handlers.core.errors import NonFiniteOutput


def rank(outputs: Tensor, k: int, outputs_are: str) -> Tensor:
    """The k best classes of each row, best first.

    Args:
        outputs: [N, classes], logits or probabilities, of any floating dtype.
        k: 1 <= k <= classes.
        outputs_are: "logits" or "probabilities".

    Returns:
        float32 [N, k, 2] on the same device: probability and class. Both in one tensor, so that one copy brings
        them to the host; float32 holds every class index up to 2**24.
    """
    scores = outputs.float()
    probabilities = scores.softmax(dim=1) if outputs_are == "logits" else scores
    # not topk: among equals, its choice depends on k, which is the largest that any neighbour asked for
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return torch.stack((values[:, :k], classes[:, :k].float()), dim=2)


def ranking(row: Tensor, labels: dict[str, str]) -> list[dict]:
    """One row of `rank`, [k, 2] on the host -> [{"label", "class", "probability"}, ...], best first.

    Raises:
        NonFiniteOutput: a probability is NaN or infinite, which JSON cannot carry.
    """
    answer = []
    for probability, index in row.tolist():
        if not math.isfinite(probability):
            raise NonFiniteOutput("The model's output for this input is not a finite number.")
        index = int(index)
        answer.append({"label": labels[str(index)], "class": index, "probability": probability})
    return answer
