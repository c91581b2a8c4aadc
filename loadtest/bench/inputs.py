"""Draw the inputs of the cases into build/bench/made-*/inputs.

    python -m loadtest.bench.inputs

The same versions of Pillow and NumPy draw the same bytes each time. A scene is a landscape of fractal noise in the
colours of its kind, with flat shapes on it. It compresses about as well as a photograph, and scenes of one kind look
alike.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
from PIL import Image, ImageDraw

from bundle.files import write_atomically
from loadtest.bench import paths
from models.mnist import make_sample

KINDS = 20  # number of kinds of scene
SHAPES = 12  # number of flat shapes on a scene
GRAIN = 11  # amplitude of the noise in each pixel, of 255
PHOTO_KIND, PHOTO_VARIATION = 7, 1_000  # a scene that the model for photographs was not fitted on
SENTENCE = "please could you move two hundred dollars from checking to my savings"


def generated(name: str) -> Path:
    """Return the file of an input; draw it if it does not exist."""
    file = paths.generated() / "inputs" / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, DRAW[name]())
    return file


def digit() -> bytes:
    """Draw a PNG, 28x28, 8-bit grey, like those of MNIST: bright ink in 20x20 pixels, centred by its centre of mass."""
    paper = numpy.asarray(make_sample.draw().convert("L"), dtype=numpy.float32)
    ink = Image.fromarray(((paper.max() - paper) * (255 / numpy.ptp(paper))).round().astype(numpy.uint8))
    ink = ink.crop(ink.point(lambda value: 255 * (value > 40)).getbbox())
    width, height = (round(side * 20 / max(ink.size)) for side in ink.size)
    pixels = numpy.asarray(ink.resize((width, height), Image.Resampling.LANCZOS))
    rows, columns = numpy.indices(pixels.shape)
    top, left = (round(14 - (pixels * axis).sum() / pixels.sum()) for axis in (rows, columns))
    canvas = numpy.zeros((28, 28), dtype=numpy.uint8)
    canvas[top : top + height, left : left + width] = pixels
    return encoded(Image.fromarray(canvas), format="PNG", optimize=True)


def photo() -> bytes:
    return encoded(scene(PHOTO_KIND, PHOTO_VARIATION, 720, 720), format="JPEG", quality=85)


def photo_12mp() -> bytes:
    return encoded(scene(PHOTO_KIND, PHOTO_VARIATION, 4000, 3000), format="JPEG", quality=88)


def scene(kind: int, variation: int, width: int, height: int) -> Image.Image:
    """Draw an RGB scene. The kind sets the colours and the roughness; the variation sets where everything lies."""
    style, place = numpy.random.default_rng(kind), numpy.random.default_rng([kind, variation])
    colours = style.integers(20, 236, size=(4, 3))
    persistence = style.uniform(0.45, 0.7)  # ratio of the amplitudes of an octave and the one before it
    stretch = style.choice([0.25, 1.0, 4.0])  # ratio of a detail's width to its height
    field = landscape(place, width, height, persistence, stretch)
    levels = numpy.linspace(0, 1, len(colours))
    channels = [numpy.interp(field, levels, colours[:, channel]) for channel in range(3)]
    grain = place.integers(
        -GRAIN, GRAIN + 1, size=(height, width, 1)
    )  # like a sensor's noise, which JPEG compresses badly
    image = Image.fromarray((numpy.stack(channels, axis=-1) + grain).clip(0, 255).astype(numpy.uint8))
    pen = ImageDraw.Draw(image)
    outline = pen.ellipse if style.random() < 0.5 else pen.rectangle
    for _ in range(SHAPES):
        x, y = place.random() * width, place.random() * height
        half = (0.02 + 0.06 * place.random()) * min(width, height)
        outline((x - half, y - half, x + half, y + half), fill=tuple(map(int, colours[place.integers(len(colours))])))
    return image


def landscape(
    place: numpy.random.Generator, width: int, height: int, persistence: float, stretch: float
) -> numpy.ndarray:
    """Return fractal noise, float32 [H, W] in [0, 1]: octaves of random numbers, each with details half as large."""
    field, amplitude, details = numpy.zeros((height, width), dtype=numpy.float32), 1.0, 4
    while details <= max(width, height):
        across = max(2, min(width, round(details / stretch)))
        down = max(2, min(height, round(details * height / width)))
        octave = Image.fromarray(place.integers(0, 256, size=(down, across), dtype=numpy.uint8))
        octave = octave.resize((width, height), Image.Resampling.BICUBIC)
        field += amplitude / 255 * numpy.asarray(octave, dtype=numpy.float32)
        amplitude, details = amplitude * persistence, details * 2
    low, high = numpy.percentile(field[::8, ::8], (1, 99))
    return ((field - low) / (high - low)).clip(0, 1)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sample(model: str, name: str) -> bytes:
    """Return a model's own sample, which its folder has drawn or synthesised."""
    return (paths.MODELS / model / name).read_bytes()


DRAW: dict[str, Callable[[], bytes]] = {
    "digit.png": digit,
    "photo.jpg": photo,
    "photo-12mp.jpg": photo_12mp,
    "word.wav": partial(sample, "audio", "sample.wav"),  # one second at 16 kHz, mono, 16 bits
    "sentence.txt": SENTENCE.encode,
    "cells.jpg": partial(sample, "cells", "sample.jpg"),  # 640 x 480
    "membrane.png": partial(sample, "membrane", "sample.png"),  # 512 x 512, grey
    "molecule.json": partial(sample, "molecule", "sample.json"),  # 16 atoms
}

if __name__ == "__main__":
    for name in DRAW:
        file = generated(name)
        print(f"{file.relative_to(paths.ROOT)}: {file.stat().st_size} bytes")
