"""The handler `text` and `make add-model` keep a tokenizer's own padding, truncation and types of tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from bundle.build.archive import archive
from bundle.build.dryrun import DryRun
from bundle.catalog import CONFIG_NAME, ModelFolder
from bundle.errors import BundleError
from handlers.core.batch import Sample
from handlers.core.errors import TextTooLong, UnsupportedInput
from handlers.text import TextHandler
from tests.unit.workbench import CLASSES, WordNet, Workbench

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = ["<s>", "<pad>", "<unk>", *(f"w{index}" for index in range(CLASSES))]
PAD, W0 = 1, 3


def made(padding: dict | None = None, truncation: dict | None = None, words: list[str] = WORDS) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if padding is not None:
        tokenizer.enable_padding(**padding)
    if truncation is not None:
        tokenizer.enable_truncation(**truncation)
    return tokenizer


def loaded(folder: Path, tokenizer: Tokenizer, batch: int = 8, **settings: object) -> TextHandler:
    tokenizer.save(str(folder / "tokenizer.json"))
    handler = TextHandler()
    handler.settings, handler.batch_size = handler.Settings(**settings), batch
    handler.load_assets(folder)
    return handler


def batch_of(handler: TextHandler, *texts: str) -> list[list[list[int]]]:
    samples = [handler.decode(handler.Inputs(data=text)) for text in texts]
    return [each.tolist() for each in handler.collate(samples)]


TRUNCATION = {"max_length": 3}


@pytest.mark.parametrize(
    ("padding", "ids", "mask"),
    [
        ({"pad_id": PAD}, [[3, 4], [5, PAD]], [[1, 1], [1, 0]]),
        ({"pad_id": PAD, "direction": "left"}, [[3, 4], [PAD, 5]], [[1, 1], [0, 1]]),
        ({"pad_id": PAD, "length": 4}, [[3, 4, PAD, PAD], [5, PAD, PAD, PAD]], [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ({"pad_id": PAD, "pad_to_multiple_of": 3}, [[3, 4, PAD], [5, PAD, PAD]], [[1, 1, 0], [1, 0, 0]]),
        (None, [[3, 4], [5, PAD]], [[1, 1], [1, 0]]),  # the vocabulary has <pad>
    ],
)
def test_batch_is_padded_as_the_tokenizer_declares(tmp_path: Path, padding, ids, mask):
    handler = loaded(tmp_path, made(padding, TRUNCATION))
    assert batch_of(handler, "w0 w1", "w2") == [ids, mask]


@pytest.mark.parametrize(("side", "kept"), [("right", [3, 4, 5]), ("left", [5, 6, 7])])
def test_text_is_truncated_on_the_side_that_the_tokenizer_declares(tmp_path: Path, side: str, kept: list[int]):
    handler = loaded(tmp_path, made({}, {**TRUNCATION, "direction": side}))
    assert batch_of(handler, "w0 w1 w2 w3 w4")[0] == [kept]


def test_module_gets_the_arguments_that_the_settings_name_with_the_tokenizers_types(tmp_path: Path):
    tokenizer = made({"pad_id": PAD, "pad_type_id": 3}, {"max_length": 8})
    tokenizer.post_processor = processors.TemplateProcessing("$A:0 <s>:2", special_tokens=[("<s>", 0)])
    handler = loaded(tmp_path, tokenizer, arguments=["ids", "types", "mask"])
    ids, types, mask = batch_of(handler, "w0 w1", "w2")
    assert ids == [[3, 4, 0], [5, 0, PAD]]
    assert types == [[0, 0, 2], [0, 2, 3]]
    assert mask == [[1, 1, 1], [1, 1, 0]]
    assert len(handler.collate([handler.example()] * 2)) == 3


def test_settings_replace_what_the_tokenizer_declares(tmp_path: Path):
    handler = loaded(tmp_path, made({"pad_id": PAD, "length": 4}, TRUNCATION), max_tokens=2, pad_id=0, pad_to=0)
    assert batch_of(handler, "w0 w1 w2", "w3") == [[[3, 4], [6, 0]], [[1, 1], [1, 0]]]


def test_start_without_a_longest_text_or_a_padding_asks_for_it(tmp_path: Path):
    with pytest.raises(ValueError, match="max_tokens: tokenizer.json has no truncation. Set `max_tokens`"):
        loaded(tmp_path, made({}))
    unpadded = made(None, TRUNCATION, ["a", "<unk>"])
    with pytest.raises(ValueError, match="pad_id: tokenizer.json does not say which token .* or `batchSize: 1`"):
        loaded(tmp_path, unpadded)
    assert batch_of(loaded(tmp_path, unpadded, batch=1), "a a") == [[[0, 0]], [[1, 1]]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_explanation_pads_as_the_predictions_do(tmp_path: Path, side: str):
    handler = loaded(tmp_path, made({"pad_id": PAD, "length": 4, "direction": side}, TRUNCATION), mask_token="<unk>")
    sample = Sample(torch.tensor([3, 4]), inputs=handler.Inputs(data="w0 w1"))
    ids, mask = handler.explainable(sample).arguments(torch.tensor([[1.0, 0.0]]))
    expected = [3, 2, PAD, PAD] if side == "right" else [PAD, PAD, 3, 2]
    assert (ids.tolist(), mask.sum().item()) == ([expected], 2)


# --- add-model -------------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """Classify a text by its last token that is not padding, as decoders do; w3 is class 3.

    Args:
        left: the padding must be on the left: the last position decides.
    """

    def __init__(self, left: bool = False):
        super().__init__()
        self.left = left
        self.weight = nn.Parameter(torch.cat((torch.zeros(W0, CLASSES), 5 * torch.eye(CLASSES))))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        last = (input_ids != 1).sum(1, keepdim=True) - 1
        if self.left:
            last = torch.full_like(last, input_ids.size(1) - 1)
        return self.weight[input_ids.gather(1, last.clamp(0))[:, 0]]


class TypesFirst(nn.Module):
    """Classify a text by the sum of its types, which come before the mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), 4)
        self.register_buffer("classes", torch.arange(CLASSES))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        total = (token_type_ids * attention_mask).sum(1, keepdim=True)
        return 0 * self.embed(input_ids).sum() - (total - self.classes).abs()


class OneLength(nn.Module):
    """Classify texts of 32 tokens only, by all of them: the padding counts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.cat((torch.zeros(W0, CLASSES), 5 * torch.eye(CLASSES))))
        self.position = nn.Parameter(torch.ones(1, 32, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.weight[input_ids] * self.position).sum(1)


def answers(workbench: Workbench, *texts: str) -> list[str]:
    """Return the label of each text, alone; in one batch, the answers must be the same, but for rounding."""

    def sent(rows: list[dict]) -> list[dict[str, float]]:
        results = worker.predict(rows)
        assert all(status == 200 for status, _ in results), results
        return [{each["label"]: each["probability"] for each in body["top_k"]} for _, body in results]

    with DryRun(workbench.store / "theirs.mar") as worker:
        rows = [{"body": text.encode()} for text in texts]
        alone = [sent([row])[0] for row in rows]
        assert sent(rows) == [pytest.approx(each, rel=1e-5) for each in alone]
    return [next(iter(each)) for each in alone]


TEXTS = "w0 w3", "w3 w1 w1 w5", "w2"


@pytest.mark.slow
@pytest.mark.parametrize("padding", [{"pad_id": PAD, "pad_token": "<pad>"}, None])
def test_model_that_looks_for_its_own_padding_answers_the_same_beside_any_neighbour(workbench: Workbench, padding):
    folder = workbench.add(Last(), files=[saved(workbench, made(padding))])
    assert answers(workbench, *TEXTS) == ["label 3", "label 5", "label 2"]
    assert (folder.config["handler"]["pad_id"], folder.config["batchSize"]) == (PAD, 8)


def saved(workbench: Workbench, tokenizer: Tokenizer) -> Path:
    file = workbench.files / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("padding", "batch"), [({"pad_id": PAD, "direction": "left"}, 8), ({"pad_id": PAD}, 1), (None, 1)]
)
def test_model_that_needs_padding_on_the_left_is_batched_only_with_a_tokenizer_that_says_so(
    workbench: Workbench, padding, batch: int
):
    folder = workbench.add(Last(left=True), files=[saved(workbench, made(padding))])
    assert answers(workbench, *TEXTS) == ["label 3", "label 5", "label 2"]
    assert folder.config["batchSize"] == batch


@pytest.mark.slow
def test_tokenizer_without_any_padding_serves_a_model_that_looks_at_it_one_text_at_a_time(workbench: Workbench):
    words = [*WORDS[:1], "<fill>", *WORDS[2:]]
    folder = workbench.add(Last(), files=[saved(workbench, made(None, None, words))])
    assert answers(workbench, *TEXTS) == ["label 3", "label 5", "label 2"]
    assert folder.config["batchSize"] == 1
    assert "pad_id" not in folder.config["handler"]
    assert "save the tokenizer with its padding" in workbench.report()


@pytest.mark.slow
def test_types_of_the_tokenizer_reach_a_model_that_takes_them_in_its_own_order(workbench: Workbench):
    tokenizer = made({"pad_id": PAD, "pad_type_id": 6})
    tokenizer.post_processor = processors.TemplateProcessing("$A:1 <s>:2", special_tokens=[("<s>", 0)])
    folder = workbench.add(TypesFirst(), files=[saved(workbench, tokenizer)])
    assert folder.config["handler"]["arguments"] == ["ids", "types", "mask"]
    assert answers(workbench, "w0", "w0 w1") == ["label 3", "label 4"]


@pytest.mark.slow
def test_model_of_one_length_gets_texts_of_that_length(workbench: Workbench):
    traced = torch.jit.trace(OneLength(), (torch.ones(1, 32, dtype=torch.int64),) * 2)
    file = saved(workbench, made({"pad_id": PAD}))
    folder = workbench.add(traced, files=[file])
    settings = folder.config["handler"]
    assert (settings["max_tokens"], settings["pad_to"], settings["pad_id"]) == (32, 32, PAD)
    assert answers(workbench, "w0 w3 w3", "w5", "w1 " * 90) == ["label 3", "label 5", "label 1"]
    unpadded = saved(workbench, made(None, None, [*WORDS[:1], "<fill>", *WORDS[2:]]))
    workbench.rejects(traced, "does not say which token fills up shorter ones", "other", files=[unpadded])


@pytest.mark.slow
@pytest.mark.parametrize("counts", [True, False])
def test_fixed_length_of_the_tokenizer_is_kept_only_where_it_changes_the_answers(workbench: Workbench, counts: bool):
    """Transformers saves the length with which a tokenizer was called last."""

    class Mean(WordNet):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.classify(self.embed(ids).mean(1))

    file = saved(workbench, made({"pad_id": PAD, "length": 24}))
    folder = workbench.add(Mean() if counts else WordNet(), files=[file])
    settings = folder.config["handler"]
    assert (settings.get("pad_to"), settings["max_tokens"]) == ((None, 24) if counts else (0, 512))
    answers(workbench, *TEXTS)


@pytest.mark.slow
def test_longer_truncation_of_the_tokenizer_is_kept(workbench: Workbench):
    folder = workbench.add(WordNet(), files=[saved(workbench, made({}, {"max_length": 900}))])
    assert folder.config["handler"]["max_tokens"] == 900


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_tokenizers_of_every_kind_are_served(workbench: Workbench, kind: str):
    added = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    kinds = {
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=20, special_tokens=added),
        ),
        "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=20, special_tokens=added)),
        "Unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=20, special_tokens=added, unk_token="[UNK]"),
        ),
    }
    model, trainer = kinds[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["the movie was good", "the movie was bad"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    network = WordNet()
    network.embed = nn.Embedding(tokenizer.get_vocab_size(), 8)
    folder = workbench.add(network, files=[saved(workbench, tokenizer)])
    assert folder.config["handler"]["pad_id"] == tokenizer.token_to_id("[PAD]")
    answers(workbench, "the movie was good", "bad", "xyz was the good bad movie")


class Lengths(WordNet):
    """Takes the lengths of the texts in place of their mask."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.classify(self.embed(tokens).sum(1) / lengths)


@pytest.mark.slow
def test_model_with_an_argument_that_the_handler_does_not_make_is_rejected(workbench: Workbench):
    workbench.rejects(
        Lengths(),
        r"takes tokens, lengths\. The handler makes token ids, their mask",
        files=[saved(workbench, made({}))],
    )


@pytest.mark.slow
def test_folder_whose_settings_name_other_arguments_than_the_module_takes_is_not_built(workbench: Workbench):
    folder = workbench.add(WordNet(), files=[saved(workbench, made({}))])
    config = folder.path / CONFIG_NAME
    config.write_text(config.read_text().replace('["ids", "mask"]', '["ids"]'))
    with pytest.raises(BundleError, match=r"the module takes ids, mask, and the handler gives it ids\. Write"):
        archive(ModelFolder(folder.path), workbench.store)


def test_ids_that_the_module_does_not_have_are_rejected(tmp_path: Path):
    """On a GPU, they would end the worker."""
    handler = loaded(tmp_path, made({"pad_id": PAD}, TRUNCATION))
    last = len(WORDS) - 1
    handler.check_tensors((torch.tensor([0, last]),))
    for ids in ([last + 1], [0, -1]):
        with pytest.raises(UnsupportedInput, match=f"from 0 to {last}"):
            handler.check_tensors((torch.tensor(ids),))
    with pytest.raises(TextTooLong, match="at most 3"):
        handler.check_tensors((torch.zeros(4, dtype=torch.int64),))


def test_types_have_one_number_for_each_token(tmp_path: Path):
    arguments = ("ids", "mask", "types")
    handler = loaded(tmp_path, made({"pad_id": PAD}, TRUNCATION), arguments=arguments)
    assert [each.name for each in handler.tensor_inputs()] == ["ids", "types"]
    handler.check_tensors((torch.tensor([3, 4]), torch.tensor([0, 1])))
    for types in ([0], [0, 2]):
        with pytest.raises(UnsupportedInput, match='"types"'):
            handler.check_tensors((torch.tensor([3, 4]), torch.tensor(types)))
