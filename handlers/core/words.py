"""Explain the answers to texts: a score for each part of the text that can be removed."""

from collections.abc import Callable

import torch
from torch import Tensor

from handlers.core.explain import Explainable


def explainable_words(
    text: str,
    count: int,
    spans: Callable[[], list[tuple[int, int]]],
    arguments: Callable[[Tensor], tuple[Tensor, ...]],
    windows: tuple[tuple[int, ...], ...] | None = None,
) -> Explainable:
    """Return a text as something to explain: each part goes from 1, which keeps it, to 0, which removes it.

    Args:
        text: as it was sent.
        count: the number of parts, words or tokens.
        spans: returns the start and the end of each part, in characters. It is called only for an answer.
        arguments: as in `Explainable`, for what is kept, float32 [N, count].
        windows: as in `Explainable`.
    """

    def scored(scores: Tensor) -> list[tuple[int, int, float]]:
        return [(*span, score) for span, score in zip(spans(), scores.tolist(), strict=True)]

    def describe(scores: Tensor) -> dict:
        parts = [{"token": text[a:b], "start": a, "end": b, "score": score} for a, b, score in scored(scores)]
        return {"attributions": parts}

    def draw(scores: Tensor, caption: str) -> bytes:
        from handlers.core import drawing  # imports Pillow, which predictions of texts do not need

        return drawing.coloured_text(text, scored(scores), caption)

    return Explainable(
        inputs=(torch.ones(1, count),),
        baselines=(torch.zeros(1, count),),
        groups=(torch.arange(count)[None],),
        arguments=arguments,
        describe=describe,
        draw=draw,
        differentiable=False,
        windows=windows,
    )
