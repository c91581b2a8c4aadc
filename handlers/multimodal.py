"""Recognise a digit from any of its picture, a few words, and a recording of its name."""

import re
from typing import Any, NamedTuple, cast

import torch
from pydantic import ConfigDict, model_validator
from torch import Tensor

from handlers.core import answers, inputs
from handlers.core.batch import Sample
from handlers.core.curves import explainable_sound
from handlers.core.digits import SIDE, read_digit
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.heatmaps import explainable_image
from handlers.core.images import WHOLE, ImageLimits, Shares
from handlers.core.inputs import Image, Sound, Text, in_field
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundWindow, read_window
from handlers.core.texts import TextLimits, check_text
from handlers.core.together import together
from handlers.core.words import explainable_words

FIELDS = ("image", "text", "audio")  # the columns of `present`


class MultimodalHandler(ExplainedClassifier):
    """Model: images, texts, waveforms, present -> logits [N, 10].

    It takes images uint8 [N, 1, 28, 28] (as in MNIST), texts int64 [N, T] (the bytes of UTF-8, each plus one; 0 is
    padding), waveforms float32 [N, window] (mono, in [-1, 1]), and present bool [N, 3]. A missing input is zeros, which
    the model ignores because `present` is false. So requests with different inputs share one run of the model.
    """

    class Settings(ExplainedClassifier.Settings, ImageLimits, SoundWindow, TextLimits):
        max_characters: PositiveInt = 200  # longer texts are rejected: all texts of a batch are padded to the longest

    class Info(NamedTuple):
        """What stays with a request: the names of the inputs, and where the model's pixels and window lie in them."""

        sent: list[str]
        place: Shares = WHOLE
        start: float = 0.0  # s

    settings: Settings
    columns = ExplainedClassifier.columns
    first = ExplainedClassifier.first

    class Inputs(inputs.Inputs):
        model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in FIELDS]})

        image: Image | None = None
        text: Text | None = None
        audio: Sound | None = None

        @model_validator(mode="after")
        def has_an_input(self):
            if self.image is None and self.text is None and self.audio is None:
                raise ValueError("send at least one of the fields image, text and audio")
            return self

    class Answer(answers.Ranking):
        """The most probable classes, best first, and the names of the inputs that were used."""

        inputs: list[str]

    ExplainAnswer = answers.JointExplanation

    def decode(self, inputs: Inputs) -> Sample:
        """Decode the inputs that are there; the others become zeros, and false in `present`.

        Raises:
            RequestError: an input cannot be decoded or exceeds a limit; the message begins with the field's name.
        """
        image, text, audio = self.nothing()
        place, start = WHOLE, 0.0
        if inputs.image is not None:
            with in_field("image"):
                image, place = read_digit(inputs.image, self.settings)
        if inputs.text is not None:
            with in_field("text"):
                text = self.decode_text(inputs.text)
        if inputs.audio is not None:
            with in_field("audio"):
                audio, start = read_window(inputs.audio, self.settings)
        sent = [name for name in FIELDS if getattr(inputs, name) is not None]
        present = torch.tensor([name in sent for name in FIELDS])
        return Sample((image, text, audio, present), info=self.Info(sent, place, start))

    def nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the picture, the text and the sound of a sample without any input."""
        pixels = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
        return pixels, torch.zeros(1, dtype=torch.int64), torch.zeros(self.settings.window)

    def decode_text(self, text: str) -> Tensor:
        check_text(text, self.settings)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + 1

    def collate(self, samples: list[Sample]) -> tuple[Tensor, ...]:
        """Stack the inputs, and pad the texts to the longest of the batch."""
        rows = cast("list[tuple[Tensor, ...]]", [sample.tensors for sample in samples])  # as `decode` makes them
        images, texts, waveforms, present = zip(*rows, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        return torch.stack(images), padded, torch.stack(waveforms), torch.stack(present)

    def encode(self, row: Tensor, info: Any, options: ExplainedClassifier.Options) -> dict:
        """Return the ranking, and the names of the inputs; `info` is an `Info`."""
        return {**super().encode(row, info, options), "inputs": info.sent}

    def example(self) -> Sample:
        image, _, waveform = self.nothing()
        tensors = image, torch.ones(12, dtype=torch.int64), waveform, torch.ones(len(FIELDS), dtype=torch.bool)
        return Sample(tensors, info=self.Info(list(FIELDS)))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with paper without ink, a text without words, and silence. Letters cannot be differentiated."""
        images, texts, waveforms, present = cast("tuple[Tensor, ...]", sample.tensors)
        sent, info = sample.inputs, cast("MultimodalHandler.Info", sample.info)
        explained: dict[str, Explainable] = {}
        if present[0]:
            digit = Sample(images, info.place, sent)
            explained["image"] = explainable_image(digit, torch.zeros(1, SIDE, SIDE), self.settings, field="image")
        if present[1]:
            explained["text"] = explainable_letters(sent.text if sent else "a text", texts)
        if present[2]:
            explained["audio"] = explainable_sound(waveforms, info.start, self.settings.sample_rate)

        def arguments(*parts: Tensor) -> tuple[Tensor, ...]:
            count, device = len(parts[0]), parts[0].device
            changed = {name: explained[name].arguments(each)[0] for name, each in zip(explained, parts, strict=True)}
            as_sent = dict(zip(FIELDS, (images, texts, waveforms), strict=True))
            rest = {n: each.to(device).expand(count, *each.shape) for n, each in as_sent.items() if n not in changed}
            return *((changed | rest)[name] for name in FIELDS), present.to(device).expand(count, -1)

        return together(explained, arguments)


def explainable_letters(text: str, letters: Tensor) -> Explainable:
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

    return explainable_words(text, len(words), lambda: words, arguments, windows=((1,),))
