"""Train the tokenizer and the intent classifier on CLINC150 (Larson et al. 2019).

This reads `clinc150/data_full.json` in the data directory. If the file is missing, it is downloaded.

    make train MODEL=text
    python -m models.text.train --data-dir data --epochs 20
"""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import requests
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn

from models import command_line, data_sets, evaluation, training
from models.text import vectors
from models.text.model import FOLDER, INTENTS, PADDING, VOCABULARY, IntentNet
from models.weights import round_weights

RECIPE = training.Recipe(
    epochs=30, batch_size=128, learning_rate=5e-3, weight_decay=0.05, label_smoothing=0.1, warmup=0.1, optimizer="adamw"
)
SOURCE = "https://raw.githubusercontent.com/clinc/oos-eval/master/data/data_full.json"
OUT_OF_SCOPE = "oos"
MAX_TOKENS = 64
KEPT = 0.95  # the share of in-scope texts that the out-of-scope threshold accepts

KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
OPENINGS = ("hello", "hi", "hey", "hey there", "good morning", "excuse me", "ok", "so", "um", "well", "please",
            "can you", "could you please", "i would like to know", "i was wondering", "quick question")  # fmt: skip
CLOSINGS = ("please", "thanks", "thank you", "thank you very much", "cheers", "for me", "if you can", "right now", "ok")


def load(data_dir: Path) -> dict[str, list[tuple[str, str]]]:
    """Load the (text, intent) pairs of the splits "train", "val", "test", "oos_train", "oos_val" and "oos_test".

    Raises:
        SystemExit: the data set is missing, and cannot be downloaded.
    """
    file = data_dir / "clinc150" / "data_full.json"
    if not file.exists():
        with data_sets.downloaded("CLINC150", data_dir):
            response = requests.get(SOURCE, timeout=60)
            response.raise_for_status()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(response.content)
    return {split: [(text, intent) for text, intent in rows] for split, rows in json.loads(file.read_text()).items()}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-pair encoding. It ignores case, accents, apostrophes and punctuation."""
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("['’‘ʼ`´]"), ""),
            normalizers.Replace(Regex(r"[^\w$%+]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_padding(pad_id=PADDING, pad_token=special[PADDING])
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, int64 [N, T], padded to the longest of `texts`."""
    encodings = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


def typo(text: str, rng: random.Random) -> str:
    """Drop, double or replace one letter, or swap it with the next one; a replacement is a neighbouring key."""
    i = rng.randrange(len(text))
    before, letter, after = text[:i], text[i], text[i + 1 :]
    row = next((row for row in KEY_ROWS if letter in row), letter)
    neighbour = row[(row.index(letter) + rng.choice((-1, 1))) % len(row)]
    return before + rng.choice((after, letter * 2 + after, after[:1] + letter + after[1:], neighbour + after))


class AlteredTexts:
    """Batches of the training texts with typical variations, which differ in every epoch.

    Mixtures of two texts with different intents are added to the out-of-scope texts. Token boundaries vary too (BPE
    dropout, Provilkov et al. 2020), so that the model knows the pieces of misspelt words. The generator of BPE dropout
    cannot be seeded, so two runs with the same seed differ slightly.

    Yields:
        input_ids and attention_mask, int64 [N, T], and targets, float32 [N, 150]: one-hot, or uniform for a text that
        is out of scope (outlier exposure, Hendrycks et al. 2019).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: list[str],
        intents: Tensor,
        out_of_scope: list[str],
        batch_size: int,
        rng: random.Random,
    ):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.model.dropout = 0.1
        self.texts, self.intents, self.batch_size, self.rng = texts, intents, batch_size, rng
        self.out_of_scope = out_of_scope * 3
        self.mixtures = len(texts) // 8
        one_hot = nn.functional.one_hot(intents, INTENTS).float()
        uniform = torch.full((len(self.out_of_scope) + self.mixtures, INTENTS), 1 / INTENTS)
        self.targets = torch.cat([one_hot, uniform])

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        texts = self.texts + self.out_of_scope + [self.mixture() for _ in range(self.mixtures)]
        epoch = (*encode(self.tokenizer, [self.alter(text) for text in texts]), self.targets)
        for ids, mask, targets in training.Batches(*epoch, batch_size=self.batch_size, shuffle=True):
            longest = int(mask.sum(1).max())
            yield ids[:, :longest], mask[:, :longest], targets

    def alter(self, text: str) -> str:
        if self.rng.random() < 0.3:
            text = f"{self.rng.choice(OPENINGS)} {text}"
        if self.rng.random() < 0.3:
            text = f"{text} {self.rng.choice(CLOSINGS)}"
        while self.rng.random() < 0.25:
            text = typo(text, self.rng)
        return text

    def mixture(self) -> str:
        """Join the first half of a text and the second half of a text with another intent."""
        first, second = self.rng.sample(range(len(self.texts)), 2)
        if self.intents[first] == self.intents[second]:
            return self.mixture()
        head, tail = self.texts[first].split(), self.texts[second].split()
        return " ".join(head[: len(head) // 2] + tail[len(tail) // 2 :])


class WordDropout:
    """Replace a tenth of the tokens by [UNK], so that no intent depends on a single word."""

    def __init__(self, unknown: int):
        self.unknown = unknown

    def __call__(self, ids: Tensor) -> Tensor:
        return torch.where((torch.rand(ids.shape, device=ids.device) < 0.1) & (ids != PADDING), self.unknown, ids)


def conditions(texts: list[str]) -> dict[str, list[str]]:
    """Return the test texts with typical variations; the polite words are among those that training adds."""
    rng = random.Random(0)
    return {
        "typo": [typo(text, rng) for text in texts],
        "upper_case": [text.upper() for text in texts],
        "punctuation": ["- " + text.replace(" ", ", ", 1) + "?!" for text in texts],
        "polite": [f"hi, {text} please thanks" for text in texts],
    }


@torch.inference_mode()
def calibrate(model: IntentNet, ids: Tensor, mask: Tensor, targets: Tensor) -> None:
    """Fit the out-of-scope threshold and the temperature (Guo et al. 2017) to the validation split.

    Args:
        model: to calibrate.
        ids: int64 [N, T].
        mask: int64 [N, T].
        targets: int64 [N]; 150 for a text that is out of scope.
    """
    model.eval()
    model.threshold.copy_(scores(model, ids, mask)[targets < INTENTS].quantile(1 - KEPT))
    logits = model(ids, mask)
    temperatures = torch.linspace(0.2, 2, 181)
    losses = torch.stack([nn.functional.cross_entropy(logits / temperature, targets) for temperature in temperatures])
    model.temperature.copy_(temperatures[losses.argmin()])


def scores(model: IntentNet, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the score of each text, float32 [N]: the higher, the more certainly the text is in scope."""
    return model.intents(ids, mask).amax(1)


@torch.inference_mode()
def out_of_scope_figures(
    model: IntentNet, inside: tuple[Tensor, Tensor], targets: Tensor, outside: tuple[Tensor, Tensor]
) -> dict:
    """Measure the recall of out-of-scope texts: with a threshold fitted to the in-scope test texts, and as served."""
    threshold = scores(model, *inside).quantile(1 - KEPT)
    answers, answers_outside = model(*inside).argmax(1), model(*outside).argmax(1)
    return {
        "oos_recall_at_95_kept": share(scores(model, *outside) < threshold),
        "as_served": {
            "in_scope_accuracy": share(answers == targets),
            "in_scope_kept": share(answers < INTENTS),
            "oos_recall": share(answers_outside == INTENTS),
        },
    }


def share(chosen: Tensor) -> float:
    return round(chosen.float().mean().item(), 5)


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER, vectors.add_option)
    recipe = replace(RECIPE, epochs=options.epochs)
    splits = load(options.data_dir)
    labels = [*sorted({intent for _, intent in splits["train"]}), OUT_OF_SCOPE]
    texts = {split: [text for text, _ in rows] for split, rows in splits.items()}
    targets = {split: torch.tensor([labels.index(intent) for _, intent in rows]) for split, rows in splits.items()}

    tokenizer = train_tokenizer(texts["train"])
    model = IntentNet()
    start = vectors.load_into(model, tokenizer, options.vectors) if options.vectors else {}
    rng = random.Random(options.seed)
    batches = AlteredTexts(tokenizer, texts["train"], targets["train"], texts["oos_train"], recipe.batch_size, rng)
    unknown = tokenizer.token_to_id("[UNK]")
    assert unknown is not None, "train_tokenizer makes it"
    augment = WordDropout(unknown)
    inside = training.Batches(*encode(tokenizer, texts["val"]), targets["val"], batch_size=500, shuffle=False)
    members = [training.Classifier(member, recipe, augment) for member in model.intents.members]
    seconds = training.fit(options, *(training.Stage(member, batches, inside) for member in members))

    model = round_weights(model.cpu())
    calibrate(
        model, *encode(tokenizer, texts["val"] + texts["oos_val"]), torch.cat([targets["val"], targets["oos_val"]])
    )
    model = round_weights(model)

    def figures(texts_: list[str]) -> dict:
        batches = training.Batches(*encode(tokenizer, texts_), targets["test"], batch_size=500, shuffle=False)
        return evaluation.evaluate(model.intents, batches, INTENTS)

    outside = encode(tokenizer, texts["oos_test"])
    report = {
        "model": "text",
        "data": {"name": "CLINC150", **{split: len(rows) for split, rows in sorted(splits.items())}},
        **start,
        **figures(texts["test"]),
        **out_of_scope_figures(model, encode(tokenizer, texts["test"]), targets["test"], outside),
        "accuracy_under": {name: figures(altered)["accuracy"] for name, altered in conditions(texts["test"]).items()},
    }
    training.save(options, model, labels, recipe, seconds, report)
    tokenizer.save(str(options.out / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
