"""Draw sample.png: a synthetic section of tissue as an electron microscope shows it, grey, 512x512.

Cells are the regions nearest to random points, their membranes the dark lines between them. It contains no image of a
data set.

    python -m models.membrane.make_sample
"""

from pathlib import Path

import numpy
from PIL import Image

SIDE = 512
CELLS = 60
MEMBRANE_WIDTH = 6.0  # pixels
WAVE = 5.0  # pixels by which membranes bend
CYTOPLASM, MEMBRANE = 165.0, 60.0  # brightness
GRAIN = 22.0  # brightness


def smooth_noise(random: numpy.random.Generator, radius: float) -> numpy.ndarray:
    """Return blurred noise of unit variance, float64 [SIDE, SIDE]."""
    frequencies = numpy.hypot(numpy.fft.fftfreq(SIDE)[:, None], numpy.fft.fftfreq(SIDE))
    blur = numpy.exp(-2 * (numpy.pi * radius * frequencies) ** 2)
    values = numpy.fft.ifft2(numpy.fft.fft2(random.normal(size=(SIDE, SIDE))) * blur).real
    return (values - values.mean()) / values.std()


def draw() -> Image.Image:
    """Draw the section, "L", 512x512."""
    random = numpy.random.default_rng(3)
    down, across = numpy.mgrid[:SIDE, :SIDE].astype(float)
    down += WAVE * smooth_noise(random, 14)
    across += WAVE * smooth_noise(random, 14)
    points = random.uniform(-40, SIDE + 40, (CELLS, 2))
    distances = numpy.hypot(down[..., None] - points[:, 0], across[..., None] - points[:, 1])
    nearest, second = numpy.moveaxis(numpy.partition(distances, 1, axis=2)[..., :2], 2, 0)
    depth = ((second - nearest) / MEMBRANE_WIDTH).clip(0, 2) / 2  # 0 on a membrane, 1 inside of a cell
    image = MEMBRANE + (CYTOPLASM - MEMBRANE) * depth + 8 * smooth_noise(random, 3) + GRAIN * smooth_noise(random, 0.8)
    return Image.fromarray(image.clip(0, 255).astype(numpy.uint8))


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("sample.png"), optimize=True)
