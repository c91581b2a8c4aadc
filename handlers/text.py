"""Text classification: a text -> the k most probable classes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from handlers.core.batch import BatchHandler
from handlers.core.errors import EmptyInput, TextTooLong, UndecodableText
from handlers.core.payload import Content
from handlers.core.settings import PositiveInt, Settings

UTF8_BYTES = 4  # of a character, at most


class TextHandler(BatchHandler):
    """Model: token ids int64 [N, T], attention mask int64 [N, T] (1 a token, 0 padding) -> logits [N, classes].

    The vocabulary is the archive's tokenizer.json, as Hugging Face's `tokenizers` saves it.
    """

    class Settings(Settings):
        max_characters: PositiveInt = 10_000  # longer texts are refused
        max_tokens: PositiveInt = 64  # what is beyond is cut off
        pad_id: int = 0

    def load_assets(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.settings.max_tokens)

    def decode(self, content: Content) -> Tensor:
        """-> token ids int64 [T], 1 <= T <= max_tokens."""
        text = self.read_text(content)
        ids = self.tokenizer.encode(text).ids
        if not ids:
            raise EmptyInput("The text has no words. Send at least one.")
        return torch.tensor(ids)

    def read_text(self, content: Content) -> str:
        limit = self.settings.max_characters
        too_long = TextTooLong(f"The text is too long; at most {limit} characters are accepted.")
        if len(content) > UTF8_BYTES * limit:
            raise too_long
        try:
            # a str can hold lone surrogates, out of JSON's \\ud800, which no tokenizer takes
            text = content.decode() if isinstance(content, bytes) else content.encode().decode()
        except UnicodeError as exc:
            raise UndecodableText("The text is not valid UTF-8.") from exc
        if len(text) > limit:
            raise too_long
        if not text.strip():
            raise EmptyInput("The text is empty. Send at least one word.")
        return text

    def collate(self, samples: list[Tensor]) -> tuple[Tensor, ...]:
        """Pads to the longest text of the batch."""
        ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=self.settings.pad_id)
        lengths = torch.tensor([len(sample) for sample in samples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids, mask

    def example(self) -> Tensor:
        return torch.zeros(16, dtype=torch.int64)
