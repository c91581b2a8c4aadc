"""Explain a detection: how much each part of an image adds to its score.

An explanation follows one box, that of the best detection of a class. On a changed image, its score is the largest of
`score x overlap with this box` over all boxes of the class (Petsiuk et al. 2021, D-RISE): the detector may find the
object elsewhere, or another object.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from handlers.core.boxes import Format, yolo_candidates
from handlers.core.outputs import Outputs, main_output


def candidates(outputs: Outputs, kind: Format, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all boxes of each image, [K, 4], and their probabilities, [K, classes]."""
    if kind != "torchvision":
        yield from zip(*yolo_candidates(main_output(outputs), kind, classes), strict=True)
        return
    for image in outputs:
        labels = torch.nn.functional.one_hot(image["labels"], classes)
        yield image["boxes"], image["scores"][:, None] * labels


def best_boxes(boxes: Tensor, probabilities: Tensor) -> Tensor:
    """Return the box with the highest probability of each class, [classes, 4]; zeros if the image has no boxes."""
    if not len(boxes):
        return boxes.new_zeros(probabilities.size(1), 4)
    return boxes[probabilities.argmax(0)]


def scores_at(explained: Tensor, boxes: Tensor, probabilities: Tensor) -> Tensor:
    """Return the score of each class at the boxes that are explained, [classes, 4] -> float32 [classes]."""
    if not len(boxes):
        return probabilities.new_zeros(len(explained))
    from torchvision.ops import box_iou  # imports much; see boxes.load_operators

    return (probabilities * box_iou(boxes, explained)).amax(0)
