"""Draw sample.jpg: a simple airplane in the sky.

python -m models.image.make_sample
"""

from PIL import Image, ImageDraw, ImageFilter

from models.image.model import FOLDER

SCALE = 4  # the picture is drawn larger and then reduced, for smooth edges


def draw(width: int = 320, height: int = 240) -> Image.Image:
    sky = Image.linear_gradient("L").resize((width * SCALE, height * SCALE))
    picture = Image.merge("RGB", [sky.point(lambda v, c=c: c + v // 4) for c in (95, 145, 200)])
    pen = ImageDraw.Draw(picture)

    def shape(points: list[tuple[int, int]], colour: tuple[int, int, int]) -> None:
        pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=colour)

    shape([(150, 118), (205, 60), (222, 60), (196, 120)], (150, 155, 165))  # far wing
    shape([(30, 125), (48, 112), (90, 106), (240, 102), (282, 112), (240, 134), (90, 140), (48, 138)], (235, 238, 242))
    shape([(238, 106), (268, 62), (286, 62), (276, 112)], (205, 60, 55))  # fin
    shape([(120, 128), (182, 122), (212, 190), (192, 192)], (190, 195, 205))  # near wing
    shape([(228, 118), (262, 116), (285, 140), (270, 142)], (190, 195, 205))  # tail plane
    for x in range(70, 220, 18):
        pen.ellipse([x * SCALE, 112 * SCALE, (x + 7) * SCALE, 119 * SCALE], fill=(70, 85, 110))
    return picture.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.6))


if __name__ == "__main__":
    draw().save(FOLDER / "sample.jpg", quality=85)
