"""A detector without weights: the extent of the bright pixels in the left and in the right half of an image."""

import torch
from torch import Tensor, nn


class Boxes(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, 1, 64, 64] -> boxes [N, 2, 4] (x1, y1, x2, y2 in pixels) and scores [N, 2]."""
        boxes, scores = [], []
        half = images.size(3) // 2
        for start in (0, half):
            part = images[:, 0, :, start : start + half].float() / 255
            bright = (part > 0.5).float()
            box = []
            for axis, offset in ((1, start), (2, 0)):  # across, then down
                line = bright.amax(dim=axis)
                first, last = line.argmax(dim=1), line.size(1) - line.flip(1).argmax(dim=1)
                box.append(torch.stack((first, last), dim=1).float() + offset)
            boxes.append(torch.stack((box[0][:, 0], box[1][:, 0], box[0][:, 1], box[1][:, 1]), dim=1))
            scores.append(part.amax(dim=(1, 2)))
        return {"boxes": torch.stack(boxes, dim=1), "scores": torch.stack(scores, dim=1)}


def build() -> nn.Module:
    return Boxes().eval()


def example_inputs(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 256, (batch, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),)
