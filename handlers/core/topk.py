"""Rank the outputs of a classifier: on the device for the whole batch, then per sample on the host."""

import torch
from torch import Tensor


def rank(outputs: Tensor, outputs_are: str) -> Tensor:
    """Rank the classes of each row, best first.

    Args:
        outputs: [N, classes], logits or probabilities, of any floating dtype.
        outputs_are: "logits" or "probabilities".

    Returns:
        float32 [N, 2, classes] on the same device: probabilities and class indices. Both are in one tensor, so that
        they need one copy to the host; float32 represents every class index up to 2**24.
    """
    scores = outputs.float()
    probabilities = scores.softmax(dim=1) if outputs_are == "logits" else scores
    # all classes, and a stable sort: the order of equal classes must not depend on the `top_k` of other requests
    values, classes = probabilities.sort(dim=1, descending=True, stable=True)
    return torch.stack((values, classes.float()), dim=1)


def best_classes(row: Tensor, k: int, labels: list[str]) -> list[dict]:
    """Return [{"label", "class", "probability"}, ...] of the k best classes.

    Args:
        row: one row of `rank`, float32 [2, classes], on the host.
        k: the number of classes to return.
        labels: of the classes, by class index.
    """
    probabilities, classes = row.numpy()[:, :k].tolist()  # slicing in numpy is faster than in torch
    return [
        {"label": labels[index], "class": index, "probability": probability}
        for probability, index in zip(probabilities, map(int, classes), strict=True)
    ]
