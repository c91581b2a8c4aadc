"""What a detector needs around its model: an image's place in the input, and outputs as rows of equal length.

The detections of an image are `boxes` float32 [K, 4] (x1, y1, x2, y2 in pixels of the model's input), `scores` [K] and
`labels` int64 [K] (the class). Mask R-CNN adds `masks` [K, 1, H, W], Keypoint R-CNN `keypoints` [K, P, 3] and
`keypoints_scores` [K, P].
"""

import base64
import importlib.util
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from handlers.core.images import Shares

Format = Literal["torchvision", "yolo", "yolov5"]
Detections = dict[str, Tensor]

GREY = (114, 114, 114)  # around the image, as in the training of the YOLO family
MIN_SCORE = 0.01  # of a candidate: thousands of boxes with lower scores would make the suppression slow
MAX_CANDIDATES = 1000  # of an image, before the suppression
NONE = -1  # pads the rows: as a score, below every threshold


def load_operators() -> None:
    """Load the compiled operators of torchvision, such as `nms`, which the archives of its detectors call, too.

    `import torchvision` would do so as well, but also imports TorchDynamo: 80 MB and a second for each worker.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is a requirement of the handlers"
    [folder] = spec.submodule_search_locations or []
    [library] = [file for file in Path(folder).glob("_C.*") if file.suffix in (".so", ".pyd")]
    torch.ops.load_library(library)


load_operators()  # here, because an archive that calls them cannot be loaded before


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an image lies in the model's input.

    Attributes:
        size: of the image, width and height in pixels.
        scale: pixels of the image per pixel of the input, across and down.
        corner: of the image in the input, x and y.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    corner: tuple[int, int] = (0, 0)

    def restore(self, points: Tensor) -> Tensor:
        """Map points from the input to the image, and into its borders: float32 [..., 2] (x, y), in pixels."""
        moved = (points - points.new_tensor(self.corner)) * points.new_tensor(self.scale)
        return moved.clamp_min(0).minimum(points.new_tensor(self.size))

    def shares(self, size: tuple[int, int]) -> Shares:
        """Return where an input of this width and height lies: left, top, right and bottom, in shares of the image."""
        edges = [-self.corner[0], -self.corner[1], size[0] - self.corner[0], size[1] - self.corner[1]]
        sides = zip(edges, self.scale * 2, self.size * 2, strict=True)
        left, top, right, bottom = (edge * scale / side for edge, scale, side in sides)
        return left, top, right, bottom


def fit(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int], enlarge: bool
) -> tuple[Image.Image, Placement]:
    """Resize an image so that it just fits into a box, with its aspect.

    Args:
        image: as decoded, perhaps at a fraction of its size.
        size: of the original, width and height.
        box: width and height.
        enlarge: also resize an image that is smaller.
    """
    ratio = min(box[0] / size[0], box[1] / size[1])
    if not enlarge:
        ratio = min(ratio, 1.0)
    width, height = (max(1, round(side * ratio)) for side in size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image, Placement(size, (size[0] / width, size[1] / height))


def letterbox(image: Image.Image, size: tuple[int, int], box: tuple[int, int]) -> tuple[Image.Image, Placement]:
    """Resize an image to fit into a box, and fill the rest with grey, the image in the middle."""
    image, placement = fit(image, size, box, enlarge=True)
    corner = ((box[0] - image.width) // 2, (box[1] - image.height) // 2)
    canvas = Image.new("RGB", box, GREY)
    canvas.paste(image, corner)
    return canvas, Placement(size, placement.scale, corner)


def stack_padded(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images, uint8 [3, H, W], of different sizes.

    Returns:
        uint8 [N, 3, largest H, largest W], padded at the right and at the bottom; int64 [N, 2], heights and widths.
    """
    sizes = torch.tensor([each.shape[1:] for each in images])
    height, width = sizes.amax(dim=0).tolist()
    padded = [pad(each, (0, width - each.size(2), 0, height - each.size(1))) for each in images]
    return torch.stack(padded), sizes


def decode_yolo(outputs: Tensor, kind: Format, classes: int, iou_threshold: float) -> list[Detections]:
    """Decode the raw outputs of the YOLO family, and suppress boxes that overlap a better one of their class.

    Args:
        iou_threshold: intersection over union above which two boxes show the same object.
        outputs, kind, classes: see `yolo_candidates`.

    Raises:
        ValueError: the outputs have another shape.
    """
    boxes, probabilities = yolo_candidates(outputs, kind, classes)
    scores, labels = probabilities.max(dim=2)
    return [suppress(*each, iou_threshold) for each in zip(boxes, scores, labels, strict=True)]


def yolo_candidates(outputs: Tensor, kind: Format, classes: int) -> tuple[Tensor, Tensor]:
    """Return all boxes of the raw outputs of the YOLO family, [N, A, 4], and their probabilities, [N, A, classes].

    Args:
        outputs: for "yolo" [N, 4 + classes, A], for "yolov5" [N, A, 5 + classes]; a box is x and y of the centre, width
            and height, in pixels of the input. The fifth value of "yolov5" is the probability of any object.
        kind: "yolo" or "yolov5".
        classes: the number of labels.

    Raises:
        ValueError: the outputs have another shape.
    """
    rows = outputs.transpose(1, 2) if kind == "yolo" and outputs.ndim == 3 else outputs
    values = (4 if kind == "yolo" else 5) + classes
    if rows.ndim != 3 or rows.size(2) != values:
        expected = f"[N, {values}, boxes]" if kind == "yolo" else f"[N, boxes, {values}]"
        raise ValueError(
            f"the model returns {list(outputs.shape)}; the format {kind} with {classes} labels is {expected}. "
            "Correct `format`, or index_to_name.json"
        )
    rows = rows.float()
    probabilities = rows[..., 4:] if kind == "yolo" else rows[..., 4:5] * rows[..., 5:]
    centre, size = rows[..., :2], rows[..., 2:4]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1), probabilities


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Detections:
    """Return the boxes of one image that no better box of their class overlaps, best first."""
    scores, best = scores.topk(min(MAX_CANDIDATES, len(scores)))
    best = best[~(scores < MIN_SCORE)]  # a score that is not a number stays, so that the answer is an error
    scores = scores[: len(best)]
    boxes, labels = boxes[best], labels[best]
    if not len(boxes):
        return {"boxes": boxes, "scores": scores, "labels": labels}
    apart = labels[:, None] * (boxes.max() - boxes.min() + 1)  # so that boxes of different classes never overlap
    kept = torch.ops.torchvision.nms(boxes + apart, scores, iou_threshold)
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def stack_detections(images: list[Detections], limit: int) -> Detections:
    """Make one row per image, all of the same length: at most `limit` detections, best first, padded with `NONE`.

    Masks become uint8, 1 where the object is, without their dimension of size 1.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in images[0]}
    for image in images:
        best = image["scores"].argsort(descending=True, stable=True)[:limit]
        for name, values in image.items():
            rows[name].append((values[best, 0] > 0.5).byte() if name == "masks" else values[best])
    if "masks" in rows:  # also of different sizes
        height, width = (max(each.size(side) for each in rows["masks"]) for side in (1, 2))
        rows["masks"] = [pad(each, (0, width - each.size(2), 0, height - each.size(1))) for each in rows["masks"]]
    return {
        name: pad_sequence(values, batch_first=True, padding_value=0 if name == "masks" else NONE)
        for name, values in rows.items()
    }


def region(box: Tensor) -> tuple[int, int, int, int]:
    """Return the whole pixels that a box touches, at least one: left, top, right, bottom."""
    left, top = (math.floor(each) for each in box[:2].tolist())
    right, bottom = (math.ceil(each) for each in box[2:].tolist())
    return left, top, max(right, left + 1), max(bottom, top + 1)


def describe(row: Detections, placement: Placement, labels: list[str]) -> list[dict]:
    """Return the detections of an image as an answer has them, in the image's pixels.

    Args:
        row: on the host, without the padding.
        placement: of the image in the model's input.
        labels: by class.
    """
    corners = placement.restore(row["boxes"].view(-1, 2, 2)).flatten(1)
    found = [
        {"label": labels[index], "class": index, "score": score, "box": rounded(box)}
        for box, score, index in zip(corners, row["scores"].tolist(), row["labels"].tolist(), strict=True)
    ]
    if "masks" in row:
        for each, mask, box in zip(found, row["masks"], row["boxes"], strict=True):
            each["mask"] = describe_mask(mask, region(box), placement)
    if "keypoints" in row:
        points = torch.cat((placement.restore(row["keypoints"][..., :2]), row["keypoints_scores"][..., None]), dim=2)
        for each, rows in zip(found, points, strict=True):
            each["keypoints"] = [rounded(point) for point in rows]
    return found


def describe_mask(mask: Tensor, pixels: tuple[int, int, int, int], placement: Placement) -> dict:
    """Return the part of a mask in a box: {"box": where it lies in the image, "png": base64, white on black}.

    Args:
        mask: uint8 [H, W], in pixels of the model's input; the PNG has the same resolution.
        pixels: of the input, that the box touches.
        placement: of the image in the model's input.
    """
    left, top, right, bottom = pixels
    part = Image.fromarray((mask[top:bottom, left:right] * 255).numpy()).convert("1")
    file = io.BytesIO()
    part.save(file, "PNG")
    box = placement.restore(torch.tensor([[left, top], [right, bottom]], dtype=torch.float32)).flatten()
    return {"box": rounded(box), "png": base64.b64encode(file.getvalue()).decode()}


def rounded(values: Tensor) -> list[float]:
    """Return numbers with two decimals: a hundredth of a pixel."""
    return [round(value, 2) for value in values.tolist()]
