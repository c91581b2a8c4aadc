"""Draw explanations as PNG files: red speaks for the class, blue speaks against it."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH, MAX_SIDE = 384, 768  # pixels of a picture
WIDTH, MARGIN, TEXT_SIZE = 800, 16, 22  # of drawn texts and curves
MAX_LINES = 60
CELLS = 56  # along a side of a heat map: scores of single pixels of a large image are noise to the eye
FOR, AGAINST = (214, 39, 40), (31, 90, 200)
BLACK, GREY, WHITE = (20, 20, 20), (150, 150, 150), (255, 255, 255)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has letters of most alphabets and comes with Matplotlib, which Captum needs."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def png(image: Image.Image) -> bytes:
    """Encode a picture with a palette, which takes less than half of the bytes."""
    file = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def relative(scores: numpy.ndarray) -> numpy.ndarray:
    """Scale scores to [-1, 1]. Of many, the highest percent is cut off, which would hide the others."""
    strength = numpy.quantile(abs(scores), 0.99 if scores.size > 400 else 1.0)
    return numpy.clip(scores / strength, -1, 1) if strength > 0 else numpy.zeros_like(scores)


def blend(share: float) -> tuple[int, ...]:
    """Return the colour of a relative score on white."""
    colour = FOR if share > 0 else AGAINST
    return tuple(round(255 + (each - 255) * 0.75 * abs(share)) for each in colour)


def captioned(picture: Image.Image, caption: str) -> bytes:
    """Write the caption below a picture, on lines as wide as it."""
    width = max(picture.width, MIN_WIDTH)
    size = TEXT_SIZE if width >= 2 * MIN_WIDTH else 15
    lines = wrap(caption, font(size), width - 16)
    canvas = Image.new("RGB", (width, picture.height + 8 + len(lines) * (size + 6) + 4), WHITE)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((8, picture.height + 8 + number * (size + 6)), line, BLACK, font(size))
    return png(canvas)


def stacked(panels: Sequence[bytes], caption: str) -> bytes:
    """Put PNG files one under the other, and write the caption below them."""
    images = [Image.open(io.BytesIO(each)).convert("RGB") for each in panels]
    canvas = Image.new("RGB", (max(each.width for each in images), sum(each.height + MARGIN for each in images)), WHITE)
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + MARGIN
    return captioned(canvas, caption)


def wrap(text: str, letters: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and letters.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def heat_map(
    image: Image.Image,
    box: Sequence[float],
    scores: numpy.ndarray,
    caption: str,
    outline: Sequence[float] | None = None,
) -> bytes:
    """Lay scores over an image.

    Args:
        image: RGB.
        box: left, top, right and bottom of the scores, in shares of the image's sides; they may lie outside of it.
        scores: float32 [H, W].
        caption: below the image.
        outline: left, top, right and bottom of a rectangle to draw, in shares of the image's sides.
    """
    longer = max(image.size)
    scale = max(min(1.0, MAX_SIDE / longer), MIN_WIDTH / longer)
    width, height = (max(1, round(side * scale)) for side in image.size)
    faded = image.convert("L").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    faded = Image.blend(faded, Image.new("RGB", faded.size, WHITE), 0.35)
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    # the part of the scores that the image shows: a box far outside of it must not take memory
    shown = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    size = max(1, shown[2] - shown[0]), max(1, shown[3] - shown[1])
    coarse = Image.fromarray(scores.astype(numpy.float32)).reduce(max(1, max(scores.shape) // CELLS))
    across, down = coarse.width / max(1, right - left), coarse.height / max(1, bottom - top)
    region = (
        max(0.0, (shown[0] - left) * across),
        max(0.0, (shown[1] - top) * down),
        min(coarse.width, (shown[2] - left) * across),
        min(coarse.height, (shown[3] - top) * down),
    )
    heat = relative(numpy.asarray(coarse.resize(size, Image.Resampling.BILINEAR, box=region)))
    for sign, colour in ((1, FOR), (-1, AGAINST)):
        opacity = Image.fromarray((numpy.clip(sign * heat, 0, 1) ** 0.7 * 215).astype(numpy.uint8))
        faded.paste(colour, (*shown[:2], shown[0] + size[0], shown[1] + size[1]), opacity)
    if shown != (0, 0, width, height):
        ImageDraw.Draw(faded).rectangle((shown[0], shown[1], shown[2] - 1, shown[3] - 1), outline=GREY)
    if outline is not None:
        corners = [share * side for share, side in zip(outline, faded.size * 2, strict=True)]
        ImageDraw.Draw(faded).rectangle(corners, outline=BLACK, width=3)
    return captioned(faded, caption)


def coloured_text(text: str, spans: Sequence[tuple[int, int, float]], caption: str) -> bytes:
    """Draw a text with a colour behind each span.

    Args:
        text: at most its first 60 lines are drawn.
        spans: start, end and score, in the order of the text.
        caption: below the text.
    """
    shares = numpy.zeros(len(text))
    for (start, end, _), share in zip(spans, relative(numpy.array([s for *_, s in spans])), strict=True):
        shares[start:end] = share
    text = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
    letters, height = font(TEXT_SIZE), TEXT_SIZE + 14
    canvas = Image.new("RGB", (WIDTH, MAX_LINES * height + 2 * MARGIN), WHITE)
    pen = ImageDraw.Draw(canvas)
    x, y, start = float(MARGIN), MARGIN, 0
    while start < len(text) and y < MAX_LINES * height:
        end = start + 1
        if text[start] == "\n":
            x, y, start = float(MARGIN), y + height, end
            continue
        if not text[start].isspace():
            while end < len(text) and not text[end].isspace():
                end += 1
        wide = sum(letters.getlength(letter) for letter in text[start:end])
        if x > MARGIN and x + wide > WIDTH - MARGIN:
            x, y = float(MARGIN), y + height
        for index in range(start, end):
            letter = letters.getlength(text[index])
            if x + letter > WIDTH - MARGIN:  # a word longer than a line
                x, y = float(MARGIN), y + height
            if shares[index]:
                pen.rectangle((x, y, x + letter, y + height - 6), fill=blend(shares[index]))
            pen.text((x, y + 3), text[index], BLACK, letters)
            x += letter
        start = end
    return captioned(canvas.crop((0, 0, WIDTH, min(canvas.height, y + height + MARGIN))), caption)


def curve(waveform: numpy.ndarray, scores: numpy.ndarray, seconds: float, caption: str) -> bytes:
    """Draw a waveform, and above it the curve of the scores of its parts, which are equally long.

    Args:
        waveform: float32 [samples].
        scores: float32 [parts].
        seconds: of the waveform.
        caption: below the curve.
    """
    upper, lower = 150, 150  # pixels of the curve and of the waveform
    canvas = Image.new("RGB", (WIDTH, upper + lower + 30), WHITE)
    pen = ImageDraw.Draw(canvas)
    shares = relative(scores)
    edges = numpy.linspace(0, WIDTH, len(scores) + 1)
    for left, right, share in zip(edges, edges[1:], shares, strict=False):
        if share:
            pen.rectangle((left, upper, right, upper + lower), fill=blend(0.6 * share))
    points = [
        ((a + b) / 2, upper * (0.5 - 0.45 * share)) for a, b, share in zip(edges, edges[1:], shares, strict=False)
    ]
    pen.line([(0, upper / 2), (WIDTH, upper / 2)], fill=GREY)
    for (x, y), share in zip(points, shares, strict=True):
        pen.line(
            [(x, upper / 2), (x, y)], fill=blend(0.8 if share > 0 else -0.8), width=max(1, WIDTH // len(scores) - 2)
        )
    pen.line(points, fill=BLACK, width=2, joint="curve")
    loudest = max(float(abs(waveform).max()), 1e-9)
    borders = numpy.linspace(0, len(waveform), WIDTH + 1).astype(int)
    for x, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        part = waveform[start : max(end, start + 1)] / loudest
        middle, half = upper + lower / 2, lower * 0.46
        pen.line([(x, middle - half * float(part.max())), (x, middle - half * float(part.min()))], fill=(60, 60, 60))
    for tenth in range(0, int(seconds * 10) + 1, max(1, round(seconds))):
        x = tenth / 10 / seconds * WIDTH
        pen.line([(x, upper + lower), (x, upper + lower + 5)], fill=BLACK)
        label = f"{tenth / 10:g}"
        pen.text((min(x + 2, WIDTH - 24), upper + lower + 6), label, BLACK, font(13))
    return captioned(canvas, caption + "; time in seconds")
