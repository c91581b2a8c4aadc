"""Small networks of other kinds than classifiers of images: detectors, segmenters, classifiers of texts."""

import torch
from torch import Tensor, nn

STRIDE = 16  # pixels of a cell of the detector's grid


class Blobs(nn.Module):
    """A detector of the YOLO family that finds white pixels: one box a cell, as large as the cell.

    Args:
        turned: return [N, 4 + classes, boxes], not [N, boxes, 5 + classes].
    """

    def __init__(self, classes: int, turned: bool):
        super().__init__()
        self.classes = classes
        self.turned = turned

    def forward(self, images: Tensor) -> Tensor:
        bright = 4 * nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16) - 3  # grey borders are 0.45
        rows, columns = bright.shape[-2], bright.shape[-1]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = torch.stack((x, y)).flatten(1).float() * 16 + 8
        boxes = torch.cat((centres, torch.full_like(centres, 16.0))).unsqueeze(0).expand(images.size(0), -1, -1)
        scores = bright.flatten(2).clamp(0, 1)
        others = scores.expand(-1, self.classes - 1, -1) / 2  # the first class is the best one
        if self.turned:
            return torch.cat((boxes, scores, others), dim=1)
        return torch.cat((boxes, torch.ones_like(scores), scores, others), dim=1).transpose(1, 2)


class Fixed(nn.Module):
    """Return a constant for each image."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, images: Tensor) -> Tensor:
        return self.output.expand(images.size(0), -1, -1) + 0 * images.mean((1, 2, 3)).view(-1, 1, 1)


class Listed(nn.Module):
    """Return a box for each image of a list, as torchvision's detectors do, with or without losses."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for image in images:
            box = torch.tensor([[0.0, 0.0, image.size(2) / 2, image.size(1) / 2]])
            found.append({"boxes": box, "scores": torch.tensor([0.75]), "labels": torch.tensor([1])})
        return found


class Levels(nn.Module):
    """Segment grey levels: class k where the pixel is nearest to k / (classes - 1).

    Args:
        shrink: return scores at a fraction of the image's size.
        as_dict: return {"out": scores}.
    """

    def __init__(self, classes: int, channels: int = 3, shrink: int = 1):
        super().__init__()
        self.shrink = shrink
        self.spread = nn.Conv2d(channels, 1, 1)
        nn.init.constant_(self.spread.weight, 1 / channels)
        nn.init.zeros_(self.spread.bias)
        self.register_buffer("levels", torch.linspace(0, 1, classes).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        scores = -(self.spread(images) - self.levels).abs()
        return nn.functional.avg_pool2d(scores, self.shrink) if self.shrink > 1 else scores


class AsDict(Levels):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        scores = -(self.spread(images) - self.levels).abs()
        return {"out": scores, "aux": scores}


class Words(nn.Module):
    """Classify texts by the sum of their tokens' embeddings. Token 0 has the embedding 0.

    Args:
        mean: of all tokens, with the padding: the outputs then depend on it.
    """

    def __init__(self, tokens: int, classes: int, mean: bool = False):
        super().__init__()
        self.embed = nn.Embedding(tokens, classes, padding_idx=0)
        self.mean = mean

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids).mean(1) if self.mean else self.embed(ids).sum(1)


class Typed(nn.Module):
    """Classify texts by ids, mask and types, with at most 32 positions, as BERT does."""

    def __init__(self, tokens: int, classes: int):
        super().__init__()
        self.embed = nn.Embedding(tokens, 8)
        self.positions = nn.Embedding(32, 8)
        self.types = nn.Embedding(2, 8)
        self.classify = nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor]:
        where = torch.arange(input_ids.size(1), device=input_ids.device)
        tokens = self.embed(input_ids) + self.positions(where) + self.types(token_type_ids)
        weights = attention_mask.unsqueeze(2).float()
        return (self.classify((tokens * weights).sum(1) / weights.sum(1)),)
