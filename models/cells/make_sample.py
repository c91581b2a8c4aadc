"""Draw sample.jpg: a blood smear under the microscope with red cells, a white cell and platelets.

python -m models.cells.make_sample
"""

import math
import random

from PIL import Image, ImageDraw, ImageFilter

from models.cells.model import FOLDER

SCALE = 3  # the picture is drawn larger and then reduced, for smooth edges
PAPER, RED, PALE, PURPLE, NUCLEUS = (226, 216, 214), (202, 152, 148), (224, 196, 194), (186, 164, 200), (98, 64, 138)
RED_CELLS = (
    *((90, 95, 50), (205, 70, 52), (330, 60, 48), (560, 90, 52), (70, 230, 51), (180, 200, 49), (90, 380, 53)),
    *((215, 330, 50), (330, 420, 48), (480, 410, 52), (590, 330, 50), (580, 215, 49)),
)  # centre and radius in pixels
WHITE_CELL = (390, 240, 92)
PLATELETS = ((285, 150, 14), (470, 60, 13), (165, 440, 15))


def blob(
    pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int], phase: float
) -> None:
    """Draw a disc with an uneven edge."""
    angles = [step * math.tau / 90 for step in range(90)]
    reach = [radius * (1 + 0.04 * math.sin(3 * a + phase) + 0.03 * math.sin(5 * a + 2 * phase)) for a in angles]
    points = [
        ((x + r * math.cos(a)) * SCALE, (y + r * math.sin(a)) * SCALE) for a, r in zip(angles, reach, strict=True)
    ]
    pen.polygon(points, fill=colour)


def draw(width: int = 640, height: int = 480) -> Image.Image:
    picture = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, (x, y, radius) in enumerate(RED_CELLS):
        blob(pen, x, y, radius, RED, number)
        blob(pen, x - 3, y + 2, radius * 0.45, PALE, number + 1)
    x, y, radius = WHITE_CELL
    blob(pen, x, y, radius, PURPLE, 0.5)
    for dx, dy, size in ((-30, -22, 42), (28, -24, 40), (4, 30, 44)):  # lobes of the nucleus
        blob(pen, x + dx, y + dy, size, NUCLEUS, dx)
    for number, (x, y, radius) in enumerate(PLATELETS):
        blob(pen, x, y, radius, (150, 112, 170), number)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(2))
    grain = random.Random(0)
    noise = Image.frombytes("L", picture.size, bytes(int(grain.gauss(128, 9)) for _ in range(width * height)))
    noise = noise.filter(ImageFilter.GaussianBlur(0.8))
    return Image.blend(picture, Image.merge("RGB", [noise] * 3), 0.12)


if __name__ == "__main__":
    draw().save(FOLDER / "sample.jpg", quality=88)
