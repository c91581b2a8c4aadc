"""Outputs of a classifier -> ranked classes: on the device for the whole batch, then one copy to the host."""

import torch
from torch import Tensor


def rank(outputs: Tensor, outputs_are: str) -> Tensor:
    """Rank the classes of each row, best first.

    Args:
        outputs: [N, classes], logits or probabilities, of any floating dtype.
        outputs_are: "logits" or "probabilities".

    Returns:
        float32 [N, 2, classes] on the same device: probabilities, and their classes. Both in one tensor, so that one
        copy brings them to the host; float32 holds every class index up to 2**24.
    """
    scores = outputs.float()
    probabilities = scores.softmax(dim=1) if outputs_are == "logits" else scores
    # all of them, stable: the order of equals must not depend on how many classes a neighbour asks for
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return torch.stack((values, classes.float()), dim=1)


def ranking(row: Tensor, k: int, labels: list[str]) -> list[dict]:
    """Make [{"label", "class", "probability"}, ...] of the k best classes in one row of `rank` on the host."""
    probabilities, classes = row.narrow(1, 0, k).tolist()
    return [
        {"label": labels[index], "class": index, "probability": probability}
        for probability, index in zip(probabilities, map(int, classes), strict=True)
    ]
