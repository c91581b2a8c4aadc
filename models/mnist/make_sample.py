"""Draw sample.png: a 3 in blue ink on white paper, 200x200.

It is slightly tilted, like handwriting. It contains no font and no image of a data set.

    python -m models.mnist.make_sample
"""

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 200
OVERSAMPLING = 4
PAPER, INK = (252, 251, 247), (28, 44, 120)
TILT = math.radians(7)  # clockwise
PEN = (0.042, 0.058)  # width at the start and at the end of the stroke
# successive cubic Bezier curves in the unit square; y points down
STROKE = (
    ((0.30, 0.27), (0.38, 0.14), (0.68, 0.12), (0.66, 0.30)),
    ((0.66, 0.30), (0.65, 0.42), (0.54, 0.47), (0.43, 0.48)),
    ((0.43, 0.48), (0.60, 0.45), (0.75, 0.55), (0.70, 0.70)),
    ((0.70, 0.70), (0.65, 0.87), (0.37, 0.88), (0.27, 0.76)),
)


def pen_positions(steps: int = 200) -> Iterator[tuple[float, float, float]]:
    """Yield (x, y, width) along the stroke, tilted about the centre of the unit square."""
    for i, (a, b, c, d) in enumerate(STROKE):
        for step in range(steps):
            t = step / steps
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) - 0.5 for axis in (0, 1))
            progress = (i + t) / len(STROKE)
            yield (
                0.5 + x * math.cos(TILT) - y * math.sin(TILT),
                0.5 + x * math.sin(TILT) + y * math.cos(TILT),
                PEN[0] + progress * (PEN[1] - PEN[0]),
            )


def draw() -> Image.Image:
    """Draw the digit, RGB, 200x200: larger first, then reduced, for smooth edges."""
    side = SIDE * OVERSAMPLING
    image = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(image)
    for x, y, width in pen_positions():
        pen.circle((x * side, y * side), width * side / 2, fill=INK)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("sample.png"), optimize=True)
