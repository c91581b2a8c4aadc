"""Make pictures of cells and of membranes: parts of the models' samples, so that each has an answer of its own."""

import io

from PIL import Image

from bundle.catalog import select
from tests.unit.inputs import encode_image


def cells() -> dict[str, bytes]:
    return parts("cells", ((0, 0, 300, 300), (280, 130, 500, 350), (400, 240, 640, 480), (0, 300, 240, 480)))


def membranes() -> dict[str, bytes]:
    return parts("membrane", ((0, 0, 200, 200), (100, 100, 500, 500), (0, 300, 512, 400), (250, 30, 330, 110)))


def parts(model: str, boxes: tuple[tuple[int, int, int, int], ...]) -> dict[str, bytes]:
    """Cut these boxes (x1, y1, x2, y2) out of a model's sample; also return a turned and a brighter sample."""
    [folder] = select([model])
    picture = Image.open(io.BytesIO(folder.sample_file.read_bytes()))
    pictures = {f"part {box}": picture.crop(box) for box in boxes}
    pictures |= {"turned": picture.rotate(90, expand=True), "bright": picture.point(lambda value: 128 + value // 2)}
    return {name: encode_image(each, "PNG") for name, each in pictures.items()}
