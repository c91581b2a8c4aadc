"""Explain the answer to several inputs of different kinds at once."""

from collections.abc import Callable

from torch import Tensor

from handlers.core.explain import Explainable


def together(parts: dict[str, Explainable], arguments: Callable[..., tuple[Tensor, ...]]) -> Explainable:
    """Return several inputs as one thing to explain. The answer has the attributions of each under its name.

    Args:
        parts: by name, each with one input. Their own `arguments` are not called.
        arguments: as in `Explainable`, for the inputs of all parts, in their order.
    """
    values, groups, first = list(parts.values()), [], 0
    for each in values:
        groups.append(each.groups[0] + first)
        first += 1 + int(each.groups[0].max())

    def describe(*attributions: Tensor) -> dict:
        described = zip(parts.items(), attributions, strict=True)
        return {"attributions": {name: part.describe(scores) for (name, part), scores in described}}

    def draw(*attributions_and_caption: Tensor | str) -> bytes:
        from handlers.core import drawing  # imports Pillow, which not all predictions need

        *attributions, caption = attributions_and_caption
        panels = [
            part.draw(scores, f"{name}, sum of its scores: {scores.sum().item():+.3g}")  # type: ignore[union-attr]  # tensors come first
            for (name, part), scores in zip(parts.items(), attributions, strict=True)
        ]
        return drawing.stacked(panels, str(caption))

    return Explainable(
        inputs=tuple(each.inputs[0] for each in values),
        baselines=tuple(each.baselines[0] for each in values),
        groups=tuple(groups),
        arguments=arguments,
        describe=describe,
        draw=draw,
        differentiable=all(each.differentiable for each in values),
        windows=tuple(each.windows[0] for each in values if each.windows) if all(e.windows for e in values) else None,
    )
