"""The embedding of the text model starts from word vectors in the formats of GloVe and fastText."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from models.text import vectors
from models.text.model import WIDTH, IntentNet
from models.text.train import train_tokenizer

WORDS = ["cancel", "booking", "weather", "music", "alarm", "recipe"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"{first} {second}" for first in WORDS for second in WORDS])


def table(width: int, count: int = len(WORDS)) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 5 + 1


def write(file: Path, rows: dict[str, torch.Tensor], header: str = "", end: str = "\n") -> Path:
    lines = [" ".join([word, *(f"{number:.6f}" for number in row.tolist())]) for word, row in rows.items()]
    file.write_text(header + "".join(line + end for line in lines), encoding="utf-8")
    return file


def glove(file: Path, rows: dict[str, torch.Tensor]) -> Path:
    return write(file, rows)


def fasttext(file: Path, rows: dict[str, torch.Tensor]) -> Path:
    """As fastText writes it: a header, and a space at the end of each line."""
    width = len(next(iter(rows.values())))
    return write(file, rows, header=f"{len(rows)} {width}\n", end=" \n")


def row_of(tokenizer: Tokenizer, word: str) -> int:
    row = tokenizer.token_to_id(vectors.WORD_START + word)
    assert row is not None
    return row


@pytest.mark.parametrize("form", [glove, fasttext])
def test_tokens_that_are_words_get_their_vectors_and_the_others_keep_their_start(form, tokenizer, tmp_path: Path):
    given = table(WIDTH)
    known = dict(zip(WORDS[:4], given, strict=False))
    file = form(tmp_path / "vectors", {**known, "unrelated": given[5], ". . .": given[4]})
    model = IntentNet()
    before = [member.tokens.weight.detach().clone() for member in model.intents.members]
    report = vectors.load_into(model, tokenizer, file)["vectors"]
    assert (report["found"], report["width"]) == (4, WIDTH)
    assert report["words"] >= len(WORDS)

    rows = [row_of(tokenizer, word) for word in known]
    others = [row for row in range(len(before[0])) if row not in rows]
    expected = given[:4] - given[:4].mean(0)
    for member, start in zip(model.intents.members, before, strict=True):
        weight = member.tokens.weight.detach()
        assert torch.equal(weight[others], start[others])
        ratio = weight[rows] / expected
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
        assert weight[rows].std().item() == pytest.approx(start.std().item(), rel=1e-3), "the scale of the start"


def test_wider_vectors_are_projected_and_keep_the_distances_of_words(tokenizer, tmp_path: Path):
    """Six vectors span five dimensions around their mean, so none of their distances is lost in 96."""
    given = table(300)
    model = IntentNet()
    vectors.load_into(model, tokenizer, glove(tmp_path / "vectors", dict(zip(WORDS, given, strict=True))))
    [weight, *_] = [member.tokens.weight.detach() for member in model.intents.members]
    ratio = torch.pdist(weight[[row_of(tokenizer, word) for word in WORDS]]) / torch.pdist(given)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_narrower_vectors_are_an_error_that_names_both_widths(tokenizer, tmp_path: Path):
    file = glove(tmp_path / "vectors", dict(zip(WORDS, table(50), strict=True)))
    with pytest.raises(SystemExit, match=f"vectors have 50 numbers, and the model's embedding {WIDTH}$"):
        vectors.load_into(IntentNet(), tokenizer, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cancel 1 2 3\nweather 1 2\n", "line 2: 2 numbers instead of 3"),
        ("cancel 1 2 3\nweather 1 2 3 4\n", "line 2: 4 numbers instead of 3"),
        ("2 3\ncancel 1 2 3\nweather 1 2\n", "line 3: 2 numbers instead of 3"),
        ("cancel 1 2 3\n\nweather 1 2 3\n", "line 2: 0 numbers instead of 3"),
        ("cancel\n", "line 1: 0 numbers"),
        ("cancel 1 2 3\nweather 1 two 3\n", "line 2: could not convert string to float: 'two'"),
        ("cancel 1 2 3\nweather 1 nan 3\n", "line 2: a number is not finite"),
        ("3 3\ncancel 1 2 3\nweather 1 2 3\n", "2 words instead of 3, as its header says"),
        ("other 1 2 3\n", "it has 0 of the"),
        ("", "it has 0 of the"),
    ],
)
def test_malformed_file_is_an_error_that_says_where(tokenizer, tmp_path: Path, content: str, message: str):
    file = tmp_path / "vectors"
    file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        vectors.load_into(IntentNet(), tokenizer, file)


def test_missing_file_is_an_error(tokenizer, tmp_path: Path):
    with pytest.raises(SystemExit, match="No such file"):
        vectors.load_into(IntentNet(), tokenizer, tmp_path / "vectors")


def test_first_of_equal_words_counts(tokenizer, tmp_path: Path):
    file = tmp_path / "vectors"
    file.write_text("cancel 1 2\ncancel 3 4\n")
    assert dict(vectors.read(file, {"cancel"})) == {"cancel": [1.0, 2.0]}
