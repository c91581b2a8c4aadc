"""The reference pipeline: what a competent user of any server writes for these models. All peers run it.

It decodes each request with the usual libraries, runs the eager float32 module on the batch, and answers in the form of
the bundle. `limit.py` measures it without a server.
"""

import io
import json

import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchvision.transforms import v2

from loadtest.bench.cases import CASES
from loadtest.bench.paths import MODELS
from models.audio import model as audio
from models.mnist import model as mnist
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
        self.answer = steps.answer
        self.model = steps.model
        self.top_k = steps.top_k

    @torch.inference_mode()
    def predict(self, samples: list[Tensor]) -> list[dict]:
        """Return an answer for each decoded request of one batch."""
        logits = self.model(*self.collate(samples))
        probabilities, classes = logits.softmax(dim=1).topk(self.top_k)
        return list(map(self.answer, probabilities.tolist(), classes.tolist()))


class Steps:
    """The steps that differ between the models."""

    model: nn.Module
    labels: list[str]
    top_k: int

    def decode(self, body: bytes) -> Tensor:
        """Decode one request into one tensor on the CPU."""
        raise NotImplementedError

    def collate(self, samples: list[Tensor]) -> tuple[Tensor, ...]:
        return (torch.stack(samples),)

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


def labels_of(model: str) -> list[str]:
    names = json.loads((MODELS / model / "index_to_name.json").read_text())
    return [names[str(index)] for index in range(len(names))]


STEPS: dict[str, type[Steps]] = {"mnist": Digits, "resnet18": Photos, "audio": Words, "text": Texts}
