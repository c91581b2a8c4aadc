"""Classify a text: the k most probable classes."""

import functools
import os
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor

from handlers.core import answers, inputs
from handlers.core.batch import Sample
from handlers.core.declared import TakesTensors, TensorInput
from handlers.core.errors import EmptyInput, TextTooLong, UnsupportedInput
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.inputs import Text
from handlers.core.outputs import main_output
from handlers.core.settings import NaturalInt, PositiveInt
from handlers.core.texts import TextLimits, check_text
from handlers.core.tokens import Argument, Padding, padding_of, truncate
from handlers.core.words import explainable_words

MASKS = ("[MASK]", "<mask>", "[UNK]", "<unk>")  # what tokenizers call tokens without a meaning of their own


class TextHandler(ExplainedClassifier, TakesTensors):
    """Model: token ids int64 [N, T], attention mask int64 [N, T] (1 token, 0 padding) -> logits [N, classes].

    The tokenizer is the archive's tokenizer.json, in the format of Hugging Face's `tokenizers`. Its truncation and its
    padding apply: the token, its type, the side, a fixed length.
    """

    class Settings(ExplainedClassifier.Settings, TextLimits):
        arguments: tuple[Argument, ...] = ("ids", "mask")  # what the module takes, in its order
        max_tokens: PositiveInt | None = None  # longer texts are truncated; None: as the tokenizer declares it
        pad_id: int | None = None  # None: the tokenizer's
        pad_to: NaturalInt | None = None  # tokens to which shorter texts are filled up; None: as the tokenizer declares
        # in an explanation, it replaces tokens that are removed; None: the attention mask hides them, if the model
        # can answer a text without tokens; otherwise, a token for masks or unknown words replaces them
        mask_token: str | None = None

    settings: Settings
    padding = Padding(token=0)  # replaced by the tokenizer's

    class Inputs(inputs.Inputs):
        data: Text

    ExplainAnswer = answers.TextExplanation

    def load_assets(self, folder: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would compete with other workers
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if self.settings.mask_token is not None and self.tokenizer.token_to_id(self.settings.mask_token) is None:
            raise ValueError(f"mask_token: the tokenizer has no token {self.settings.mask_token}")
        self.padding = padding_of(self.tokenizer, self.settings.pad_id, self.settings.pad_to)
        if self.padding.token is None and (self.batch_size > 1 or self.padding.least):
            raise ValueError(
                "pad_id: tokenizer.json does not say which token fills up the shorter texts of a batch. Set `pad_id` "
                "in the section `handler:`, or `batchSize: 1`"
            )
        self.tokenizer.no_padding()
        self.longest = truncate(self.tokenizer, self.settings.max_tokens)

    def decode(self, inputs: Inputs) -> Sample:
        """Encode a text as token ids, int64 [T], and with them their types if the module takes them."""
        check_text(inputs.data, self.settings)
        # without the offsets, which only `explainable` needs
        [encoding] = self.tokenizer.encode_batch_fast([inputs.data])
        ids = encoding.ids
        if not ids:
            raise EmptyInput("The text has no words. Send at least one word.")
        if "types" in self.settings.arguments:
            return Sample((torch.tensor(ids), torch.tensor(encoding.type_ids)))
        return Sample(torch.from_numpy(numpy.array(ids, dtype=numpy.int64)))

    def tensor_inputs(self) -> tuple[TensorInput, ...]:
        names = ("ids", "types") if "types" in self.settings.arguments else ("ids",)
        return tuple(TensorInput(name, "INT64", (-1,)) for name in names)

    def check_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        """Check token ids: the module would fail on an unknown one, and on a GPU it would end the worker."""
        ids = tensors[0]
        if len(ids) > self.longest:
            raise TextTooLong(f"The text has {len(ids)} tokens; at most {self.longest} are accepted.")
        for name, values, size in zip(("ids", "types"), tensors, (self.tokenizer.get_vocab_size(), 2), strict=False):
            if values.shape != ids.shape or values.min() < 0 or values.max() >= size:
                raise UnsupportedInput(f'"{name}" must have one number from 0 to {size - 1} for each token.')

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Pad the texts, and make the attention mask: the module's arguments, each int64 [N, T]."""
        # in NumPy, whose operations on small arrays take a fifth of the time of torch's
        texts = [tokens_of(sample).numpy() for sample in samples]
        mask = self.padding.mask(numpy.array([len(text) for text in texts]))

        def filled(rows: list[numpy.ndarray], padding: int | None) -> Tensor:
            batch = numpy.full(mask.shape, padding or 0)
            batch[mask] = numpy.concatenate(rows)
            return torch.from_numpy(batch)

        made = {"ids": filled(texts, self.padding.token), "mask": torch.from_numpy(mask.astype(numpy.int64))}
        if "types" in self.settings.arguments:
            made["types"] = filled([sample.tensors[1].numpy() for sample in samples], self.padding.type)
        return tuple(made[name] for name in self.settings.arguments)

    def example(self) -> Sample:
        ids = torch.zeros(min(16, self.settings.max_tokens or 16), dtype=torch.int64)
        return Sample((ids, ids) if "types" in self.settings.arguments else ids)

    @functools.cached_property
    def mask_id(self) -> int | None:
        """The token that replaces removed ones; None if the attention mask hides them."""
        if self.settings.mask_token is not None:
            return self.tokenizer.token_to_id(self.settings.mask_token)
        pad_id = self.padding.token or 0
        nothing = torch.full((1, 2), pad_id, device=self.device)
        zeros = torch.zeros_like(nothing)
        with torch.no_grad():
            if main_output(self.original(*self.arrange(nothing, zeros, zeros))).isfinite().all():
                return None
        found = (self.tokenizer.token_to_id(token) for token in MASKS)
        return next((token for token in found if token is not None), pad_id)

    def arrange(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, ...]:
        """Return the module's arguments for texts of one length, each int64 [N, T], padded as `collate` pads them."""
        missing = self.padding.width(ids.shape[1]) - ids.shape[1]
        sides = (missing, 0) if self.padding.left else (0, missing)
        made = {"ids": (ids, self.padding.token or 0), "mask": (mask, 0), "types": (types, self.padding.type)}
        return tuple(torch.nn.functional.pad(made[n][0], sides, value=made[n][1]) for n in self.settings.arguments)

    def explainable(self, sample: Sample) -> Explainable:
        """Remove tokens: from 1, which keeps a token, to 0, which removes it. Ids cannot be differentiated."""
        ids = tokens_of(sample)
        types = sample.tensors[1] if isinstance(sample.tensors, tuple) else torch.zeros_like(ids)
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
            own = types.to(kept.device).expand_as(mask)
            if self.mask_id is None:
                return self.arrange(torch.where(mask == 1, ids.to(kept.device), self.padding.token or 0), mask, own)
            masked = torch.where(mask == 1, ids.to(kept.device), self.mask_id)
            return self.arrange(masked, torch.ones_like(mask), own)

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


def tokens_of(sample: Sample) -> Tensor:
    """Return a text's token ids, int64 [T]."""
    return sample.tensors[0] if isinstance(sample.tensors, tuple) else sample.tensors
