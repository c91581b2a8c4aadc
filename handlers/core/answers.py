"""The types of answers and explanations, from which the OpenAPI schema is made. A worker does not check its answers."""

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

Box = Annotated[list[float], Field(min_length=4, max_length=4, description="x1, y1, x2, y2 in the image's pixels")]
Base64PNG = Annotated[str, Field(description="a PNG file in base64")]

Labelled = TypedDict("Labelled", {"label": str, "class": int})


class RankedClass(Labelled):
    probability: float


class Ranking(TypedDict):
    """The most probable classes, best first."""

    top_k: list[RankedClass]


class Mask(TypedDict):
    """The part of an object's mask in a box, white on black."""

    box: Box
    png: Base64PNG


class Detection(Labelled):
    score: float
    box: Box
    mask: NotRequired[Mask]
    keypoints: NotRequired[Annotated[list[list[float]], Field(description="x, y and score of each point")]]


class SegmentedClass(Labelled):
    share: Annotated[float, Field(description="of the image's pixels")]
    pixels: int


# --- explanations --------------------------------------------------------------------------------------------------


class Target(Labelled):
    """The class whose score is explained; `box` is what a detector found of it."""

    probability: NotRequired[float]
    score: float
    baseline_score: float
    box: NotRequired[Box]


class Explanation(TypedDict):
    target: Target
    method: str
    completeness_gap: NotRequired[
        Annotated[float, Field(description="the sum of the scores, less the difference that they should explain")]
    ]


class ImageSize(TypedDict):
    width: int
    height: int


class ImageScores(TypedDict):
    """A score for each pixel of the model's input, in rows; `crop` is where they lie in the image."""

    attributions: list[list[float]]
    crop: Box
    image: ImageSize


class SoundScores(TypedDict):
    """A score for each `step` seconds of the sound, from `start` on."""

    attributions: list[float]
    start: float
    step: float


class TokenScore(TypedDict):
    """The score of a part of the text, and its place in characters."""

    token: str
    start: int
    end: int
    score: float


class TextScores(TypedDict):
    attributions: list[TokenScore]


class EdgeScore(TypedDict):
    edge: Annotated[list[int], Field(min_length=2, max_length=2)]
    score: float


class PartScores(TypedDict):
    nodes: list[float]
    edges: list[EdgeScore]


class ImageExplanation(Explanation, ImageScores):
    pass


class SoundExplanation(Explanation, SoundScores):
    pass


class TextExplanation(Explanation, TextScores):
    pass


class GraphExplanation(Explanation):
    attributions: PartScores


class JointScores(TypedDict, total=False):
    image: ImageScores
    text: TextScores
    audio: SoundScores


class JointExplanation(Explanation):
    """The scores of each input that was sent."""

    attributions: JointScores
