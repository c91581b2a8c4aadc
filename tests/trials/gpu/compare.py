"""How far an answer is from the expected one. Precisions differ between devices, so that answers do."""

import base64
import io
from collections.abc import Iterator

import numpy
from PIL import Image

from bundle.samples import Ranked, ranking

PROBABILITIES, BOXES, MASKS, EXPLANATIONS = 0.03, 0.1, 0.02, 0.15  # the largest deviations that are accepted
SURE = 0.5  # score of a detection that must have a counterpart: others may fall below the threshold


class TooDifferent(AssertionError):
    """An answer deviates more than is accepted."""


def deviation(expected: dict, actual: dict) -> float:
    """Return the largest deviation of an answer.

    It is that of a class's probability; of detections, that of a score or of a box (1 - intersection over union); of
    masks, the share of the pixels that have another class.

    Raises:
        TooDifferent: it exceeds the limit for this kind of answer.
    """
    if "detections" in expected:
        found, limit = of_detections(expected["detections"], actual["detections"]), BOXES
    elif "mask" in expected:
        found, limit = of_masks(expected["mask"], actual["mask"]), MASKS
    else:
        found, limit = of_rankings(ranking(expected), ranking(actual)), PROBABILITIES
    if found > limit:
        raise TooDifferent(f"the answer deviates by {found:.3g}, more than {limit}: {shortened(actual)}")
    return found


def of_rankings(expected: list[Ranked], actual: list[Ranked]) -> float:
    """Compare the probabilities of the expected classes; one that is not among the best is at most the worst listed."""
    if not expected or not actual:
        raise TooDifferent(f"the answer is not a ranking: {actual}")
    listed, least = {each.label: each.probability for each in actual}, actual[-1].probability
    return max(
        abs(each.probability - listed[each.label]) if each.label in listed else max(0.0, each.probability - least)
        for each in expected
    )


def of_detections(expected: list[dict], actual: list[dict]) -> float:
    """Compare each sure detection with its nearest counterpart, in both directions."""
    return max(one_way(expected, actual), one_way(actual, expected))


def one_way(these: list[dict], those: list[dict]) -> float:
    worst = 0.0
    for each in these:
        if each["score"] < SURE:
            continue
        same = [other for other in those if other["class"] == each["class"]]
        distances = [max(1 - overlap(each["box"], o["box"]), abs(each["score"] - o["score"])) for o in same]
        worst = max(worst, min(distances, default=1.0))
    return worst


def overlap(one: list[float], other: list[float]) -> float:
    """Return the intersection over union of two boxes, x1, y1, x2, y2."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    common = max(0.0, width) * max(0.0, height)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return common / (area - common) if area > common else 1.0


def of_masks(expected: str, actual: str) -> float:
    pictures = [numpy.asarray(Image.open(io.BytesIO(base64.b64decode(mask)))) for mask in (expected, actual)]
    if pictures[0].shape != pictures[1].shape:
        raise TooDifferent(f"the mask has the size {pictures[1].shape} instead of {pictures[0].shape}")
    return float((pictures[0] != pictures[1]).mean())


def explanation_deviation(expected: dict, actual: dict) -> float:
    """Return the norm of the difference of two explanations' attributions, relative to the expected ones' norm.

    Raises:
        TooDifferent: it is too large, or the explanations are about different classes.
    """
    targets = [each["target"]["label"] for each in (expected, actual)]
    if targets[0] != targets[1]:
        raise TooDifferent(f"the explanation is about {targets[1]} instead of {targets[0]}")
    one, other = (numpy.array(list(numbers(each["attributions"]))) for each in (expected, actual))
    if one.shape != other.shape:
        raise TooDifferent(f"the explanation has {len(other)} numbers instead of {len(one)}")
    found = float(numpy.linalg.norm(one - other) / max(numpy.linalg.norm(one), 1e-9))
    if not found <= EXPLANATIONS:
        raise TooDifferent(f"the explanation deviates by {found:.3g} of its norm, more than {EXPLANATIONS}")
    return found


def numbers(value: object) -> Iterator[float]:
    """Yield the floats in nested lists and dicts, in order; integers are positions or indices."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)


def shortened(answer: object) -> str:
    text = str(answer)
    return text if len(text) < 300 else f"{text[:300]} ..."
