"""Classify a text: the k most probable classes."""

import functools
import os
from pathlib import Path
from typing import cast

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.errors import EmptyInput
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.inputs import Text
from handlers.core.outputs import main_output
from handlers.core.settings import PositiveInt
from handlers.core.texts import TextLimits, check_text
from handlers.core.words import explainable_words

MASKS = ("[MASK]", "<mask>", "[UNK]", "<unk>")  # what tokenizers call tokens without a meaning of their own


class TextHandler(ExplainedClassifier):
    """Model: token ids int64 [N, T], attention mask int64 [N, T] (1 token, 0 padding) -> logits [N, classes].

    The tokenizer is the archive's tokenizer.json, in the format of Hugging Face's `tokenizers`.
    """

    class Settings(ExplainedClassifier.Settings, TextLimits):
        max_tokens: PositiveInt = 64  # longer texts are truncated
        pad_id: int = 0
        # in an explanation, it replaces tokens that are removed; None: the attention mask hides them, if the model
        # can answer a text without tokens; otherwise, a token for masks or unknown words replaces them
        mask_token: str | None = None

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Text

    def load_assets(self, folder: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would compete with other workers
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if self.settings.mask_token is not None and self.tokenizer.token_to_id(self.settings.mask_token) is None:
            raise ValueError(f"mask_token: the tokenizer has no token {self.settings.mask_token}")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.settings.max_tokens)

    def decode(self, inputs: Inputs) -> Sample:
        """Encode a text as token ids, int64 [T], 1 <= T <= max_tokens."""
        check_text(inputs.data, self.settings)
        # without the offsets, which only `explainable` needs
        [encoding] = self.tokenizer.encode_batch_fast([inputs.data])
        ids = encoding.ids
        if not ids:
            raise EmptyInput("The text has no words. Send at least one word.")
        return Sample(torch.from_numpy(numpy.array(ids, dtype=numpy.int64)))

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Pad the token ids to the longest text of the batch, and make the attention mask."""
        # in NumPy, whose operations on small arrays take a fifth of the time of torch's
        texts = [cast("Tensor", sample.tensors).numpy() for sample in samples]  # as `decode` makes them
        lengths = numpy.array([len(text) for text in texts])
        mask = numpy.arange(lengths.max()) < lengths[:, None]
        ids = numpy.full(mask.shape, self.settings.pad_id)
        ids[mask] = numpy.concatenate(texts)
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(numpy.int64))

    def example(self) -> Sample:
        return Sample(torch.zeros(16, dtype=torch.int64))

    @functools.cached_property
    def mask_id(self) -> int | None:
        """The token that replaces removed ones; None if the attention mask hides them."""
        if self.settings.mask_token is not None:
            return self.tokenizer.token_to_id(self.settings.mask_token)
        nothing = torch.full((1, 2), self.settings.pad_id, device=self.device)
        with torch.no_grad():
            if main_output(self.original(nothing, torch.zeros_like(nothing))).isfinite().all():
                return None
        found = (self.tokenizer.token_to_id(token) for token in MASKS)
        return next((token for token in found if token is not None), self.settings.pad_id)

    def explainable(self, sample: Sample) -> Explainable:
        """Remove tokens: from 1, which keeps a token, to 0, which removes it. Ids cannot be differentiated."""
        ids = cast("Tensor", sample.tensors)
        text = sample.inputs.data if sample.inputs else ""
        words = torch.arange(len(ids))
        if sample.inputs:
            # the tokens that a tokenizer adds to each text, such as [CLS], are never removed
            added = torch.tensor(self.tokenizer.encode(text).special_tokens_mask)
            words = words[added == 0]
        if not len(words):
            raise EmptyInput("The text has no words. Send at least one word.")

        def arguments(kept: Tensor) -> tuple[Tensor, ...]:
            mask = torch.ones(len(kept), len(ids), dtype=torch.int64, device=kept.device)
            mask[:, words.to(kept.device)] = kept.round().long()
            if self.mask_id is None:
                return ids.to(kept.device) * mask + self.settings.pad_id * (1 - mask), mask
            return torch.where(mask == 1, ids.to(kept.device), self.mask_id), torch.ones_like(mask)

        def spans() -> list[tuple[int, int]]:
            offsets = self.tokenizer.encode(text).offsets
            found = []
            for word in words.tolist():
                start, end = offsets[word]
                while start < end and text[start].isspace():  # some tokenizers count the space before a word
                    start += 1
                found.append((start, end))
            return found

        return explainable_words(text, len(words), spans, arguments)
