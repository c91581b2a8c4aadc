"""Explanations of models that users bring: without gradients, with auxiliary outputs, with tokenizers of their own."""

import io
import warnings
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from bundle.build.dryrun import DryRun
from bundle.catalog import ModelFolder
from tests.unit.inputs import encode_image
from tests.unit.workbench import CLASSES, Auxiliary, SmallNet, WordNet, Workbench, static_int8

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
EXPLAIN = {"explain": "True"}
PHOTOGRAPH = encode_image(Image.effect_noise((40, 32), 60).convert("RGB"), "PNG")


def explain(workbench: Workbench, folder: ModelFolder, mask_token: str | None = None, **request: object) -> dict:
    """Return the JSON answer of the folder's archive, after a picture of the same was made."""
    with DryRun(workbench.store / f"{folder.name}.mar") as worker:
        changed = {"max_explain_seconds": 300.0} | ({"mask_token": mask_token} if mask_token else {})
        worker.handler.settings = worker.handler.settings.model_copy(update=changed)
        [(status, picture)] = worker.predict([{**request, "format": "png"}], [EXPLAIN])
        assert status == 200, picture
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
        [(status, answer)] = worker.predict([request], [EXPLAIN])
        assert status == 200, answer
        [(status, rejected)] = worker.predict([{**request, "method": "none"}], [EXPLAIN])
        assert status == 400
        return answer | {"methods": rejected["message"]}


def test_quantised_network_without_gradients_is_explained_by_removing_parts(workbench):
    with warnings.catch_warnings(action="ignore"):
        folder = workbench.add(static_int8(SmallNet(3, 32), side=32))
    answer = explain(workbench, folder, data=PHOTOGRAPH)
    assert answer["method"] == "feature_ablation"
    assert "gradients" not in answer["methods"]


def test_network_with_auxiliary_outputs_is_explained_by_its_main_one(workbench):
    answer = explain(workbench, workbench.add(Auxiliary(3, 32)), data=PHOTOGRAPH)
    assert answer["method"] == "integrated_gradients"
    difference = answer["target"]["score"] - answer["target"]["baseline_score"]
    assert abs(answer["completeness_gap"]) <= 0.05 * abs(difference)


def tokenizer(file: Path, *special: str, frame: bool = False) -> Path:
    words = ["[PAD]", *special, "a", "text", "to", "try"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
        )
    made.save(str(file))
    return file


class Summed(nn.Module):
    """Adds up one score for each word, so that the Shapley values of all words are known."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        scores = (self.embed(ids) * mask.unsqueeze(2)).sum(1)
        return (scores.exp() / scores.exp().sum(1, keepdim=True)).log()


def test_text_network_that_cannot_answer_an_empty_text_is_explained_with_the_unknown_word(workbench):
    """Its mean over no tokens is not a number."""
    file = tokenizer(workbench.files / "tokenizer.json", "[UNK]")
    folder = workbench.add(WordNet(), handler="text", files=[file])
    answer = explain(workbench, folder, data="try a text")
    assert [each["token"] for each in answer["attributions"]] == ["try", "a", "text"]
    assert answer["completeness_gap"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("mask_token", [None, "[MASK]"])
def test_tokens_that_a_tokenizer_adds_have_no_score(workbench, mask_token):
    file = tokenizer(workbench.files / "tokenizer.json", "[UNK]", "[CLS]", "[SEP]", "[MASK]", frame=True)
    folder = workbench.add(Summed(), handler="text", files=[file])
    answer = explain(workbench, folder, mask_token, data="try to")
    assert [(each["token"], each["start"], each["end"]) for each in answer["attributions"]] == [
        ("try", 0, 3),
        ("to", 4, 6),
    ]
    assert answer["completeness_gap"] == pytest.approx(0, abs=1e-4)
