"""Draws the inputs of the cases into build/bench/made-*/inputs; the same bytes each time, by the same Pillow and NumPy.

    python -m loadtest.bench.inputs

A scene is a landscape of fractal noise in the colours of its kind, with flat shapes on it: it compresses about as well
as a photograph does, and pictures of one kind resemble each other.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy
from PIL import Image, ImageDraw

from bundle.files import write_atomically
from loadtest.bench import paths
from models.mnist import make_sample

KINDS = 20  # of scenes
SHAPES = 12  # on a scene
GRAIN = 11  # of 255
PHOTO_KIND, PHOTO_VARIATION = 7, 1_000  # of no picture that the model of the photographs was fitted on
SENTENCE = "please could you move two hundred dollars from checking to my savings"


def made(name: str) -> Path:
    """The input's file, drawn where it is not there yet."""
    file = paths.made() / "inputs" / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, DRAW[name]())
    return file


def digit() -> bytes:
    """PNG, 28x28, 8-bit grey, laid out as MNIST's: bright ink that fits 20x20, its centre of mass in the middle."""
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
    """RGB. The kind decides the colours and how rough the landscape is; the variation decides where everything lies."""
    style, place = numpy.random.default_rng(kind), numpy.random.default_rng([kind, variation])
    colours = style.integers(20, 236, size=(4, 3))
    persistence = style.uniform(0.45, 0.7)  # how much of the amplitude is left when details are half as large
    stretch = style.choice([0.25, 1.0, 4.0])  # of the details, sideways
    field = landscape(place, width, height, persistence, stretch)
    levels = numpy.linspace(0, 1, len(colours))
    channels = [numpy.interp(field, levels, colours[:, channel]) for channel in range(3)]
    grain = place.integers(-GRAIN, GRAIN + 1, size=(height, width, 1))  # a sensor's, which no JPEG packs well
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
    """Fractal noise, float32 [H, W] in [0, 1]: octaves of random numbers, each with details half as large."""
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


def encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def word() -> bytes:
    """WAV: one second at 16 kHz, mono, 16 bits, spoken by a synthesiser."""
    return (paths.MODELS / "audio" / "sample.wav").read_bytes()


DRAW: dict[str, Callable[[], bytes]] = {
    "digit.png": digit,
    "photo.jpg": photo,
    "photo-12mp.jpg": photo_12mp,
    "word.wav": word,
    "sentence.txt": SENTENCE.encode,
}

if __name__ == "__main__":
    for name in DRAW:
        file = made(name)
        print(f"{file.relative_to(paths.ROOT)}: {file.stat().st_size} bytes")
