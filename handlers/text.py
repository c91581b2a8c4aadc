"""Classify a text: the k most probable classes."""

from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.classifier import ClassifierHandler
from handlers.core.errors import EmptyInput
from handlers.core.inputs import Text
from handlers.core.settings import PositiveInt
from handlers.core.texts import TextLimits, check_text


class TextHandler(ClassifierHandler):
    """Model: token ids int64 [N, T], attention mask int64 [N, T] (1 token, 0 padding) -> logits [N, classes].

    The tokenizer is the archive's tokenizer.json, in the format of Hugging Face's `tokenizers`.
    """

    class Settings(ClassifierHandler.Settings, TextLimits):
        max_tokens: PositiveInt = 64  # longer texts are truncated
        pad_id: int = 0

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Text

    def load_assets(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.settings.max_tokens)

    def decode(self, inputs: Inputs) -> Sample:
        """Encode a text as token ids, int64 [T], 1 <= T <= max_tokens."""
        check_text(inputs.data, self.settings)
        ids = self.tokenizer.encode(inputs.data).ids
        if not ids:
            raise EmptyInput("The text has no words. Send at least one word.")
        return Sample(torch.tensor(ids))

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Pad the token ids to the longest text of the batch, and make the attention mask."""
        texts = cast("list[Tensor]", [sample.tensors for sample in samples])  # as `decode` makes them
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.settings.pad_id)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids, mask

    def example(self) -> Sample:
        return Sample(torch.zeros(16, dtype=torch.int64))
