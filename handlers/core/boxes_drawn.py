"""Draw detections on an image."""

import io

import torch
from PIL import Image, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from handlers.core.boxes import Detections, Placement

# dark enough for white text, and distinct also for colour-blind readers (after Okabe and Ito 2008)
COLOURS = ((0, 114, 178), (190, 75, 0), (0, 120, 90), (160, 60, 120), (120, 90, 0), (60, 60, 60))
SHOWN_KEYPOINT = 0.0  # least score: torchvision's scores of keypoints are logits
MASK_OPACITY = 0.45


def draw(image: Image.Image, row: Detections, placement: Placement, labels: list[str], max_pixels: int) -> bytes:
    """Draw boxes with their labels and scores, and masks and keypoints if there are some. Return a PNG file.

    Args:
        image: "RGB", the original. If it has more than `max_pixels`, the picture is a reduced copy.
        row: on the host, without the padding.
        placement: of the image in the model's input.
        labels: by class.
    """
    ratio = min(1.0, (max_pixels / (image.width * image.height)) ** 0.5)
    if ratio < 1:
        image = image.resize([max(1, int(side * ratio)) for side in image.size], Image.Resampling.BILINEAR)
    zoom = torch.tensor([image.width / placement.size[0], image.height / placement.size[1]])
    unit = max(1, round(min(image.size) / 300))  # width of a line
    colours = [COLOURS[index % len(COLOURS)] for index in row["labels"].tolist()]
    if "masks" in row and len(colours):
        image = lay_masks(image, row["masks"], colours, placement)
    canvas = pil_to_tensor(image)
    if len(colours):
        corners = (placement.restore(row["boxes"].view(-1, 2, 2)) * zoom).flatten(1)
        corners[:, 2:] = corners[:, 2:].maximum(corners[:, :2])
        names = zip(row["labels"].tolist(), row["scores"].tolist(), strict=True)
        canvas = draw_bounding_boxes(
            canvas,
            corners,
            labels=[f"{labels[index]} {score:.2f}" for index, score in names],
            colors=colours,
            width=unit,
            font=font_file(),
            font_size=max(11, 8 * unit),
            fill_labels=True,
            label_colors="white",
        )
    if "keypoints" in row and len(colours):
        points = placement.restore(row["keypoints"][..., :2]) * zoom
        visible = row["keypoints_scores"] > SHOWN_KEYPOINT
        canvas = draw_keypoints(canvas, points, colors=(220, 50, 32), radius=2 * unit, visibility=visible)
    file = io.BytesIO()
    to_pil_image(canvas).save(file, "PNG", compress_level=1)
    return file.getvalue()


def lay_masks(image: Image.Image, masks: Tensor, colours: list[tuple], placement: Placement) -> Image.Image:
    """Lay masks over a picture of the whole image; where they overlap, the best one is shown.

    They are joined in the pixels of the model's input, so that a hundred cost little more than one.

    Args:
        image: "RGB".
        masks: uint8 [K, H, W] of the model's input, best first.
        colours: red, green, blue of each mask.
        placement: of the image in the model's input.
    """
    width, height = (round(side / scale) for side, scale in zip(placement.size, placement.scale, strict=True))
    left, top = placement.corner
    masks = masks[:, top : top + height, left : left + width]
    best = masks.argmax(0)  # the first one, if there are many
    paint = Image.fromarray(torch.tensor(colours, dtype=torch.uint8)[best].numpy())
    opacity = Image.fromarray((masks.amax(0) * round(255 * MASK_OPACITY)).numpy())
    paint, opacity = (each.resize(image.size, Image.Resampling.NEAREST) for each in (paint, opacity))
    return Image.composite(paint, image, opacity)


def font_file() -> io.BytesIO:
    """Return Pillow's own font as a file, which torchvision loads at the size that it needs."""
    font = ImageFont.load_default(size=10)
    return io.BytesIO(font.font_bytes)  # type: ignore[union-attr]  # with a size, it is a FreeType font
