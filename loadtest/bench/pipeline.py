"""The reference pipeline: what a competent user of any server writes for these models. All peers run it.

It decodes each request with the usual libraries, runs the eager float32 module on the batch, and answers in the form of
the bundle. `limit.py` measures it without a server. `python -m loadtest.bench.pipeline CASE` prints its answer as JSON.
"""

import base64
import io
import json
import sys
from typing import Any

import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms import v2

from loadtest.bench.cases import CASES
from loadtest.bench.paths import MODELS
from models.audio import model as audio
from models.cells import model as cells
from models.membrane import model as membrane
from models.mnist import model as mnist
from models.molecule import model as molecule
from models.text import model as text

MAX_TOKENS = 64


class Pipeline:
    """A decoder and a model for the requests of one case.

    Args:
        case: the case's name.
        threads: number of threads that torch uses for one operation.
    """

    def __init__(self, case: str, threads: int):
        torch.set_num_threads(threads)
        steps = STEPS[CASES[case].model]()
        self.decode = steps.decode
        self.collate = steps.collate
        self.answers = steps.answers
        self.model = steps.model

    @torch.inference_mode()
    def predict(self, samples: list) -> list[dict]:
        """Return an answer for each decoded request of one batch."""
        return self.answers(self.model(*self.collate(samples)), samples)


class Steps:
    """The steps that differ between the models. By default, those of a classifier."""

    model: nn.Module
    labels: list[str]
    top_k: int

    def decode(self, body: bytes) -> Any:
        """Decode one request into one sample on the CPU: by default, a tensor."""
        raise NotImplementedError

    def collate(self, samples: list) -> tuple[Tensor, ...]:
        return (torch.stack(samples),)

    def answers(self, outputs: Tensor, samples: list) -> list[dict]:
        """Make one answer for each sample of a batch."""
        probabilities, classes = outputs.softmax(dim=1).topk(self.top_k)
        return list(map(self.answer, probabilities.tolist(), classes.tolist()))

    def answer(self, probabilities: list[float], classes: list[int]) -> dict:
        ranking = zip(classes, probabilities, strict=True)
        return {"top_k": [{"label": self.labels[index], "class": index, "probability": p} for index, p in ranking]}


class Digits(Steps):
    top_k = 3

    def __init__(self):
        self.model = mnist.build()

    def decode(self, body: bytes) -> Tensor:
        """Decode an image: uint8 [1, 28, 28]."""
        return v2.functional.pil_to_tensor(Image.open(io.BytesIO(body)).convert("L").resize((mnist.SIZE, mnist.SIZE)))

    def answer(self, probabilities: list[float], classes: list[int]) -> dict:
        return {"top_3_classes": classes, "top_3_probabilities": probabilities}


class Photos(Steps):
    top_k = 5

    def __init__(self):
        from loadtest.bench import resnet  # not at the top: it imports the bundle, which the other cases do not need

        self.model = resnet.build()
        self.labels = json.loads(resnet.fitted(resnet.LABELS).read_text())
        self.transform = v2.Compose(
            [
                v2.Resize(256),
                v2.CenterCrop(224),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(resnet.MEAN, resnet.STD),
            ]
        )

    def decode(self, body: bytes) -> Tensor:
        """Decode an image: float32 [3, 224, 224], normalised."""
        return self.transform(Image.open(io.BytesIO(body)).convert("RGB"))


class Words(Steps):
    top_k = 3

    def __init__(self):
        self.model = audio.build()
        self.labels = labels_of("audio")

    def decode(self, body: bytes) -> Tensor:
        """Decode a sound, which has the model's rate and length: float32 [16000]."""
        samples, _ = soundfile.read(io.BytesIO(body), dtype="float32")
        return torch.from_numpy(samples)


class Texts(Steps):
    top_k = 3

    def __init__(self):
        self.model = text.build()
        self.labels = labels_of("text")
        self.tokenizer = Tokenizer.from_file(str(text.FOLDER / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def decode(self, body: bytes) -> Tensor:
        """Tokenize a text: int64 [T]."""
        return torch.tensor(self.tokenizer.encode(body.decode()).ids)

    def collate(self, samples: list[Tensor]) -> tuple[Tensor, ...]:
        """Pad to the longest text of the batch: token ids and mask, int64 [N, T]."""
        ids = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=text.PADDING)
        lengths = torch.tensor([len(sample) for sample in samples])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


class Cells(Steps):
    THRESHOLD, OVERLAP, MOST = 0.35, 0.5, 100  # as in the model folder

    def __init__(self):
        self.model = cells.build()
        self.labels = labels_of("cells")

    def decode(self, body: bytes) -> tuple[Tensor, float, tuple[int, int]]:
        """Decode an image: uint8 [3, 288, 384], padded at the right and at the bottom; its scale and its own size."""
        image = Image.open(io.BytesIO(body)).convert("RGB")
        scale = min(cells.WIDTH / image.width, cells.HEIGHT / image.height)
        resized = v2.functional.pil_to_tensor(image.resize((round(image.width * scale), round(image.height * scale))))
        missing = [0, 0, cells.WIDTH - resized.shape[2], cells.HEIGHT - resized.shape[1]]
        return v2.functional.pad(resized, missing, fill=114), scale, image.size

    def collate(self, samples: list) -> tuple[Tensor, ...]:
        return (torch.stack([image for image, _, _ in samples]),)

    def answers(self, outputs: Tensor, samples: list) -> list[dict]:
        return [self.detections(output, *place) for output, (_, *place) in zip(outputs, samples, strict=True)]

    def detections(self, output: Tensor, scale: float, size: tuple[int, int]) -> dict:
        """Make an answer of one image's output, float32 [4 + classes, A]."""
        scores, classes = output[4:].max(dim=0)
        likely = scores >= self.THRESHOLD
        scores, classes = scores[likely], classes[likely]
        boxes = box_convert(output[:4, likely].T, "cxcywh", "xyxy")
        kept = batched_nms(boxes, scores, classes, self.OVERLAP)[: self.MOST]
        boxes = (boxes[kept] / scale).clamp(min=0).minimum(torch.tensor(size * 2))
        found = zip(classes[kept].tolist(), scores[kept].tolist(), boxes.tolist(), strict=True)
        return {
            "detections": [{"label": self.labels[c], "class": c, "score": score, "box": box} for c, score, box in found]
        }


class Membranes(Steps):
    def __init__(self):
        self.model = membrane.build()
        self.labels = labels_of("membrane")

    def decode(self, body: bytes) -> Tensor:
        """Decode an image, which has the size of the model's input: uint8 [1, 512, 512]."""
        return v2.functional.pil_to_tensor(Image.open(io.BytesIO(body)).convert("L"))

    def answers(self, outputs: Tensor, samples: list) -> list[dict]:
        return list(map(self.segments, outputs.argmax(dim=1).to(torch.uint8)))

    def segments(self, mask: Tensor) -> dict:
        pixels = mask.flatten().bincount(minlength=len(self.labels))
        classes = [
            {"label": label, "class": index, "share": count / mask.numel(), "pixels": count}
            for index, (label, count) in enumerate(zip(self.labels, pixels.tolist(), strict=True))
        ]
        file = io.BytesIO()
        v2.functional.to_pil_image(mask).save(file, "PNG", compress_level=3)  # as the bundle does
        return {
            "classes": sorted(classes, key=lambda each: -each["share"]),
            "mask": base64.b64encode(file.getvalue()).decode(),
            "size": [mask.shape[1], mask.shape[0]],
        }


class Molecules(Steps):
    top_k = 2

    def __init__(self):
        from torch_geometric.data import Batch, Data  # not at the top: importing it takes seconds
        from torch_geometric.utils import to_undirected

        self.batch, self.data, self.to_undirected = Batch.from_data_list, Data, to_undirected
        self.model = molecule.build()
        self.labels = labels_of("molecule")

    def decode(self, body: bytes | dict) -> Any:
        """Make PyTorch Geometric's `Data` of a graph. TorchServe parses JSON itself."""
        graph = (body if isinstance(body, dict) else json.loads(body))["data"]
        edges = torch.tensor(graph["edges"], dtype=torch.int64).reshape(-1, 2).T
        return self.data(x=torch.tensor(graph["nodes"]), edge_index=self.to_undirected(edges))

    def collate(self, samples: list) -> tuple[Tensor, ...]:
        """Join the graphs: node types, int64 [V]; edges, int64 [2, E]; nodes of each graph, int64 [N]."""
        joined = self.batch(samples)
        return joined.x, joined.edge_index, joined.ptr.diff()


def labels_of(model: str) -> list[str]:
    names = json.loads((MODELS / model / "index_to_name.json").read_text())
    return [names[str(index)] for index in range(len(names))]


def reference(case: str) -> dict:
    """Return the answer to a case's input."""
    pipeline = Pipeline(case, threads=1)
    [answer] = pipeline.predict([pipeline.decode(CASES[case].body)])
    return answer


STEPS: dict[str, type[Steps]] = {
    "mnist": Digits,
    "resnet18": Photos,
    "audio": Words,
    "text": Texts,
    "cells": Cells,
    "membrane": Membranes,
    "molecule": Molecules,
}

if __name__ == "__main__":
    print(json.dumps(reference(sys.argv[1])))
