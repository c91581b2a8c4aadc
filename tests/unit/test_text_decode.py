"""Decoding of texts to token ids, with a tokenizer made here."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from handlers.core.batch import Sample
from handlers.core.errors import EmptyInput, RequestError, TextTooLong, UndecodableText
from handlers.text import TextHandler
from tests.unit.inputs import decoded

WORDS = ["[PAD]", "[UNK]", "what", "is", "my", "balance", "größe", "残高"]


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> TextHandler:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False, handle_chinese_chars=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    folder: Path = tmp_path_factory.mktemp("archive")
    tokenizer.save(str(folder / "tokenizer.json"))
    handler = TextHandler()
    handler.settings = handler.Settings(max_tokens=8, max_characters=100)
    handler.load_assets(folder)
    return handler


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("What is my balance", [2, 3, 4, 5]),
        (b"What is my balance", [2, 3, 4, 5]),
        ("größe".encode(), [6]),
        ("残高", [7]),
        ("\N{GRINNING FACE} is", [1, 3]),
        ("  my\r\n\tbalance ", [4, 5]),
        ("my " * 20, [4] * 8),  # cut at max_tokens
        ("\ufeffmy balance", [4, 5]),
        ("my balance".encode("utf-8-sig"), [4, 5]),
        ("my balance".encode("utf-16"), [4, 5]),  # PowerShell writes such files
        (b"\xfe\xff" + "größe".encode("utf-16-be"), [6]),
        ("größe".encode("utf-32"), [6]),
    ],
)
def test_text_is_decoded_to_token_ids(handler: TextHandler, content: bytes | str, ids: list[int]):
    sample = decoded(handler, content)
    assert (sample.tolist(), sample.dtype) == (ids, torch.int64)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"\xff\xfe", EmptyInput, "text is empty"),  # the byte order mark alone
        (b"\xff\xfea", UndecodableText, "not valid UTF-8"),
        ("my balance".encode("utf-16-le"), UndecodableText, "contains NUL"),
        ("my balance\0", UndecodableText, "contains NUL"),
        ("größe".encode("latin-1"), UndecodableText, "not valid UTF-8"),
        ("lone \ud800 surrogate", UndecodableText, "not valid UTF-8"),
        (" \r\n\t\u3000", EmptyInput, "text is empty"),
        (b" \n", EmptyInput, "text is empty"),
        ("\x7f\x7f", EmptyInput, "no words"),
        ("x" * 101, TextTooLong, "at most 100 characters"),
        (b"x" * 1_000_000, TextTooLong, "at most 100 characters"),
        ("残" * 101, TextTooLong, "at most 100 characters"),
        (("残" * 101).encode(), TextTooLong, "at most 100 characters"),
        (b"\xfd" * 1_000_000, UndecodableText, "not valid UTF-8"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_invalid_text_is_rejected(handler: TextHandler, content: bytes | str, error: type, message: str):
    with pytest.raises(error, match=message):
        decoded(handler, content)


@pytest.mark.parametrize("letter", ["x", "ö", "残", "\N{GRINNING FACE}"])
def test_length_limit_counts_characters_not_bytes(handler: TextHandler, letter: str):
    assert decoded(handler, (letter * 100).encode()).tolist() == decoded(handler, letter * 100).tolist()


@given(st.one_of(st.text(), st.binary()))
def test_any_content_is_decoded_or_rejected(handler: TextHandler, content: bytes | str):
    try:
        sample = decoded(handler, content)
    except RequestError:
        return
    assert 1 <= len(sample) <= handler.settings.max_tokens


@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=8), min_size=1, max_size=9))
def test_collate_pads_and_masks(handler: TextHandler, texts: list[list[int]]):
    ids, mask = handler.collate([Sample(torch.tensor(text)) for text in texts])
    assert ids.shape == mask.shape == (len(texts), max(map(len, texts)))
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
    for text, row, flags in zip(texts, ids.tolist(), mask.tolist(), strict=True):
        assert row == text + [0] * (len(row) - len(text))
        assert flags == [1] * len(text) + [0] * (len(row) - len(text))
