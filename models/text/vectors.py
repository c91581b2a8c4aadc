"""Start the embedding of tokens from word vectors: files of GloVe, or fastText's `.vec` files."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.text.model import IntentNet

WORD_START = "▁"  # the mark of a token that begins a word (Metaspace)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--vectors`."""
    parser.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="start the tokens' embedding from word vectors, as GloVe (no header) or fastText (.vec) publish them. A "
        "token that begins a word gets the vector of the word that is spelt like it, in lower case; the others keep "
        "their random start. Wider vectors are reduced to the model's width by principal components",
    )


def load_into(model: IntentNet, tokenizer: Tokenizer, file: Path) -> dict:
    """Set the embeddings of the tokens that are words in the file, in every member of the model.

    The vectors are centred, and scaled to the variance of the random start, because the recipe's learning rate and the
    pairs' embeddings have that scale.

    Returns:
        {"vectors": the file's name, the vectors' width, how many tokens begin a word, and how many of them were found}.

    Raises:
        SystemExit: the file is missing or malformed, its vectors are narrower than the embedding, or it has fewer than
            two of the words.
    """
    starts = {
        token.removeprefix(WORD_START): row
        for token, row in tokenizer.get_vocab().items()
        if token.startswith(WORD_START) and token != WORD_START
    }
    try:
        found = dict(read(file, set(starts)))
    except OSError as exc:
        raise SystemExit(f"error: --vectors {file}: {exc.strerror}") from exc
    if len(found) < 2:
        raise SystemExit(f"error: --vectors {file}: it has {len(found)} of the {len(starts)} words of the vocabulary")
    table = torch.tensor(list(found.values()))
    tables = [cast("nn.Embedding", member.tokens).weight for member in model.intents.members]
    wide, width = table.shape[1], tables[0].shape[1]
    if wide < width:
        raise SystemExit(f"error: --vectors {file}: its vectors have {wide} numbers, and the model's embedding {width}")
    rows = torch.tensor([starts[word] for word in found])
    table = reduced(table, width)
    table /= table.std().clamp(min=1e-12)
    with torch.no_grad():
        for weight in tables:
            weight[rows] = table * weight.std()
    print(f"{file.name}: vectors of {len(found)} of {len(starts)} words ({len(found) / len(starts):.0%})")
    return {"vectors": {"file": file.name, "width": wide, "words": len(starts), "found": len(found)}}


def reduced(table: Tensor, width: int) -> Tensor:
    """Centre vectors, float32 [N, D], and project them onto their first `width` principal components if D is larger."""
    table = table - table.mean(dim=0)
    if table.shape[1] == width:
        return table
    _, directions = torch.linalg.eigh(table.T.double() @ table.double())  # the smallest variance first
    return table @ directions[:, -width:].float()


def read(file: Path, words: set[str]) -> Iterator[tuple[str, list[float]]]:
    """Yield the vectors of these words, at the first line of each.

    A word may contain spaces, as some of GloVe's do. The numbers of other words are counted, but not read.

    Raises:
        SystemExit: a line is malformed, or the file ends before the number of words that its header names.
    """
    missing = set(words)
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        width = promised = 0
        number = 0
        for number, line in enumerate(lines, 1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                promised, width = map(int, fields)
                continue
            width = width or len(fields) - 1
            if not width or len(fields) <= width or (len(fields) > width + 1 and is_number(fields[-width - 1])):
                raise SystemExit(
                    f"error: {file}, line {number}: {len(fields) - 1} numbers instead of {width or 'some'}"
                )
            word = " ".join(fields[:-width])
            if word not in missing:
                continue
            try:
                vector = [float(field) for field in fields[-width:]]
            except ValueError as exc:
                raise SystemExit(f"error: {file}, line {number}: {exc}") from exc
            if not all(map(math.isfinite, vector)):
                raise SystemExit(f"error: {file}, line {number}: a number is not finite")
            missing.remove(word)
            yield word, vector
    if promised and number - 1 != promised:
        raise SystemExit(f"error: {file}: {number - 1} words instead of {promised}, as its header says")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
