"""`make add-model` with classifiers of texts, and their tokenizers."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.errors import UsageError
from tests.unit.networks import Typed, Words
from tests.unit.workbench import CLASSES, LABELS, SmallNet, WordNet, Workbench

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
VOCABULARY = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(CLASSES))]


@pytest.fixture
def tokenizer(workbench: Workbench) -> Path:
    return save_tokenizer(workbench, VOCABULARY)


def save_tokenizer(workbench: Workbench, words: list[str], **truncation: int) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if truncation:
        tokenizer.enable_truncation(**truncation)
    file = workbench.files / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def classes(workbench: Workbench, *texts: str) -> list[str]:
    with DryRun(workbench.store / "theirs.mar") as worker:
        answers = worker.predict([{"body": text.encode()} for text in texts])
    assert all(status == 200 for status, _ in answers), answers
    return [body["top_k"][0]["label"] for _, body in answers]


def spelling(network: nn.Module) -> nn.Module:
    """Give token w3 the class 3, and so on."""
    with torch.no_grad():
        network.embed.weight[2:] = 5 * torch.eye(CLASSES)
        network.embed.weight[:2] = 0
    return network


def test_text_classifier_that_takes_ids_alone_is_served(workbench: Workbench, tokenizer: Path):
    folder = workbench.add(spelling(Words(len(VOCABULARY), CLASSES)), files=[tokenizer])
    assert folder.bundle.handler == "text"
    assert folder.config["handler"].items() >= {"max_tokens": 512, "pad_id": 0, "outputs": "logits"}.items()
    assert folder.config["batchSize"] == 8
    assert not archive(folder, workbench.store).rebuilt
    assert classes(workbench, "w3", "w5 w5 w1", "unknown w2") == ["label 3", "label 5", "label 2"]


def test_text_classifier_that_takes_types_and_has_32_positions_is_served(workbench: Workbench, tokenizer: Path):
    network = Typed(len(VOCABULARY), CLASSES).eval()
    workbench.add(torch.jit.script(network), kind="text", files=[tokenizer])
    assert "takes token ids, their mask, their types" in workbench.report()
    assert "cut after 32 tokens" in workbench.report()
    with torch.no_grad():
        ids = torch.tensor([[2, 5, 4]])
        [expected] = network(ids, torch.ones_like(ids), torch.zeros_like(ids))[0].argmax(1).tolist()
    assert classes(workbench, "w0 w3 w2", "w1 " * 100)[0] == LABELS[expected]


def test_text_classifier_whose_outputs_depend_on_padding_answers_each_text_alone(workbench: Workbench, tokenizer: Path):
    network = spelling(Words(len(VOCABULARY), CLASSES, mean=True))
    with torch.no_grad():
        network.embed.weight[0] = torch.eye(CLASSES)[6] * 9  # the padding speaks for class 6
    folder = workbench.add(network, files=[tokenizer])
    assert folder.config["batchSize"] == 1
    assert "a batch of N takes N times as long" in workbench.report()
    with DryRun(workbench.store / "theirs.mar") as worker:
        body = json.dumps({"instances": ["w3", "w1 w1 w1 w1 w1 w1"]}).encode()
        [(status, answer)] = worker.predict([{"body": body}], [{"Content-Type": "application/json"}])
    assert status == 200, answer
    assert [each["top_k"][0]["label"] for each in answer["predictions"]] == ["label 3", "label 1"]


def test_tokenizers_own_truncation_is_used(workbench: Workbench):
    file = save_tokenizer(workbench, VOCABULARY, max_length=24)
    folder = workbench.add(WordNet(), files=[file])
    assert folder.config["handler"]["max_tokens"] == 24


def test_text_classifier_with_another_models_tokenizer_is_rejected(workbench: Workbench):
    file = save_tokenizer(workbench, [*VOCABULARY, *(f"more{index}" for index in range(30))])
    workbench.rejects(WordNet(), "fails on token 38, although .* has 39 tokens", files=[file])


def test_text_classifier_traced_with_one_length_is_rejected(workbench: Workbench, tokenizer: Path):
    class OneLength(Words):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids.view(-1, 64))

    traced = torch.jit.trace(OneLength(len(VOCABULARY), CLASSES), torch.ones(1, 64, dtype=torch.int64))
    workbench.rejects(traced, "The model fails|runs on texts of .* tokens, and not on shorter ones", files=[tokenizer])


def test_text_classifier_without_its_tokenizer_is_recognised(workbench: Workbench):
    workbench.rejects(WordNet(), "runs on token ids, not on images. Set KIND=text")
    workbench.rejects(WordNet(), "FILES=path/to/tokenizer.json", kind="text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "video"}, "no kind 'video'; there are: image, detection, segmentation, text, sound"),
        ({"kind": "text", "handler": "image_topk"}, "HANDLER=image_topk does not serve KIND=text"),
        ({"format": "yolo9"}, "no format 'yolo9'; there are: torchvision, yolo, yolov5"),
        ({"kind": "image", "format": "yolo"}, "FORMAT is the format of a detector's outputs"),
    ],
)
def test_contradictory_options_are_rejected(workbench: Workbench, options, message):
    assert isinstance(workbench.rejects(SmallNet(3, 32), message, **options), UsageError)
