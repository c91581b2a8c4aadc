"""Recognise a digit from any of its picture, a few words, and a recording of its name."""

import re
from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.curves import explainable_sound
from handlers.core.digits import SIDE, read_digit
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.heatmaps import explainable_image
from handlers.core.images import ImageLimits
from handlers.core.inputs import Image, Sound, Text, in_field
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundLimits, loudest_window, read_sound, resample
from handlers.core.texts import TextLimits, check_text
from handlers.core.together import together

FIELDS = ("image", "text", "audio")  # the columns of `present`


class MultimodalHandler(ExplainedClassifier):
    """Model: images, texts, waveforms, present -> logits [N, 10].

    It takes images uint8 [N, 1, 28, 28] (as in MNIST), texts int64 [N, T] (the bytes of UTF-8, each plus one; 0 is
    padding), waveforms float32 [N, window] (mono, in [-1, 1]), and present bool [N, 3]. A missing input is zeros, which
    the model ignores because `present` is false. So requests with different inputs share one run of the model.

    The answer is {"top_k": [...], "inputs": [the names of the inputs that were used]}.
    """

    class Settings(ExplainedClassifier.Settings, ImageLimits, SoundLimits, TextLimits):
        max_characters: PositiveInt = 200  # longer texts are rejected: all texts of a batch are padded to the longest
        sample_rate: PositiveInt = 16_000  # Hz, of the model
        window_seconds: Annotated[float, Field(gt=0)] = 1.0  # of the model

    settings: Settings

    class Inputs(inputs.Inputs):
        image: Image | None = None
        text: Text | None = None
        audio: Sound | None = None

        @model_validator(mode="after")
        def has_an_input(self):
            if self.image is None and self.text is None and self.audio is None:
                raise ValueError("send at least one of the fields image, text and audio")
            return self

    def decode(self, inputs: Inputs) -> Sample:
        """Decode the inputs that are there; the others become zeros, and false in `present`.

        Raises:
            RequestError: an input cannot be decoded or exceeds a limit; the message begins with the field's name.
        """
        decoders: dict[str, Callable] = {
            "image": lambda content: read_digit(content, self.settings)[0],
            "text": self.decode_text,
            "audio": lambda content: self.decode_audio(content)[0],
        }
        tensors, present = self.nothing(), []
        for column, name in enumerate(FIELDS):
            value = getattr(inputs, name)
            present.append(value is not None)
            if value is not None:
                with in_field(name):
                    tensors[column] = decoders[name](value)
        used = [name for name, there in zip(FIELDS, present, strict=True) if there]
        return Sample((*tensors, torch.tensor(present)), info=used)

    def nothing(self) -> list[Tensor]:
        """Return the tensors of a sample without any input."""
        pixels = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
        return [pixels, torch.zeros(1, dtype=torch.int64), torch.zeros(self.window)]

    def decode_text(self, text: str) -> Tensor:
        check_text(text, self.settings)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + 1

    def decode_audio(self, content: bytes) -> tuple[Tensor, float]:
        """Return the waveform, and its start in the clip, in seconds."""
        waveform = resample(*read_sound(content, self.settings), self.settings.sample_rate)
        waveform = waveform - waveform.mean()  # a constant offset of the microphone is not sound
        samples, start = loudest_window(waveform, self.window)
        return torch.from_numpy(samples), start / self.settings.sample_rate

    @property
    def window(self) -> int:
        """The length of the model's window, in samples."""
        return round(self.settings.window_seconds * self.settings.sample_rate)

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Stack the inputs, and pad the texts to the longest of the batch."""
        rows = cast("list[tuple[Tensor, ...]]", [sample.tensors for sample in samples])  # as `decode` makes them
        images, texts, waveforms, present = zip(*rows, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        return torch.stack(images), padded, torch.stack(waveforms), torch.stack(present)

    def encode(self, row: Tensor, info: Any, options: ExplainedClassifier.Options) -> dict:
        """Return the ranking, and the names of the inputs, which are `info`."""
        return {**super().encode(row, info, options), "inputs": info}

    def example(self) -> Sample:
        image, _, waveform = self.nothing()
        return Sample((image, torch.ones(12, dtype=torch.int64), waveform, torch.ones(len(FIELDS), dtype=torch.bool)))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with paper without ink, a text without words, and silence. Letters cannot be differentiated."""
        images, texts, waveforms, present = cast("tuple[Tensor, ...]", sample.tensors)
        sent = sample.inputs
        explained: dict[str, Explainable] = {}
        if present[0]:
            place = read_digit(sent.image, self.settings)[1] if sent else None
            blank = torch.zeros(1, SIDE, SIDE)
            explained["image"] = explainable_image(Sample(images, place, sent), blank, self.settings, field="image")
        if present[1]:
            explained["text"] = explainable_words(sent.text if sent else "a text", texts)
        if present[2]:
            start = self.decode_audio(sent.audio)[1] if sent else 0.0
            explained["audio"] = explainable_sound(waveforms, start, self.settings.sample_rate)

        def arguments(*parts: Tensor) -> tuple[Tensor, ...]:
            count, device = len(parts[0]), parts[0].device
            changed = {name: explained[name].arguments(each)[0] for name, each in zip(explained, parts, strict=True)}
            as_sent = dict(zip(FIELDS, (images, texts, waveforms), strict=True))
            rest = {n: each.to(device).expand(count, *each.shape) for n, each in as_sent.items() if n not in changed}
            return *((changed | rest)[name] for name in FIELDS), present.to(device).expand(count, -1)

        return together(explained, arguments)


def explainable_words(text: str, letters: Tensor) -> Explainable:
    """Return a text as something to explain: a word that is removed becomes padding.

    Args:
        text: as it was sent.
        letters: int64 [T], its bytes, each plus one.
    """
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    word_of = torch.full((len(letters),), len(words))
    for index, (start, end) in enumerate(words):
        word_of[len(text[:start].encode()) : len(text[:end].encode())] = index

    def arguments(kept: Tensor) -> tuple[Tensor, ...]:
        spaces = kept.any(1, keepdim=True)  # without any word, there are none
        return (letters.to(kept.device) * torch.cat([kept, spaces], dim=1).round().long()[:, word_of.to(kept.device)],)

    def describe(scores: Tensor) -> dict:
        parts = [
            {"token": text[start:end], "start": start, "end": end, "score": score}
            for (start, end), score in zip(words, scores.tolist(), strict=True)
        ]
        return {"attributions": parts}

    def draw(scores: Tensor, caption: str) -> bytes:
        from handlers.core import drawing

        spans = [(*word, score) for word, score in zip(words, scores.tolist(), strict=True)]
        return drawing.coloured_text(text, spans, caption)

    return Explainable(
        inputs=(torch.ones(1, len(words)),),
        baselines=(torch.zeros(1, len(words)),),
        groups=(torch.arange(len(words))[None],),
        arguments=arguments,
        describe=describe,
        draw=draw,
        differentiable=False,
        windows=((1,),),
    )
