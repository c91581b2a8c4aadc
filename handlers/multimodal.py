"""Recognise a digit from any of its picture, a few words, and a recording of its name."""

from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.classifier import ClassifierHandler
from handlers.core.digits import SIDE, read_digit
from handlers.core.images import ImageLimits
from handlers.core.inputs import Image, Sound, Text, in_field
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundLimits, loudest_window, read_sound, resample
from handlers.core.texts import TextLimits, check_text

FIELDS = ("image", "text", "audio")  # the columns of `present`


class MultimodalHandler(ClassifierHandler):
    """Model: images, texts, waveforms, present -> logits [N, 10].

    It takes images uint8 [N, 1, 28, 28] (as in MNIST), texts int64 [N, T] (the bytes of UTF-8, each plus one; 0 is
    padding), waveforms float32 [N, window] (mono, in [-1, 1]), and present bool [N, 3]. A missing input is zeros, which
    the model ignores because `present` is false. So requests with different inputs share one run of the model.

    The answer is {"top_k": [...], "inputs": [the names of the inputs that were used]}.
    """

    class Settings(ClassifierHandler.Settings, ImageLimits, SoundLimits, TextLimits):
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
            "image": self.decode_image,
            "text": self.decode_text,
            "audio": self.decode_audio,
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

    def decode_image(self, content: bytes) -> Tensor:
        return read_digit(content, self.settings)[0]

    def decode_text(self, text: str) -> Tensor:
        check_text(text, self.settings)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + 1

    def decode_audio(self, content: bytes) -> Tensor:
        waveform = resample(*read_sound(content, self.settings), self.settings.sample_rate)
        waveform = waveform - waveform.mean()  # a constant offset of the microphone is not sound
        return torch.from_numpy(loudest_window(waveform, self.window)[0])

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

    def encode(self, row: Tensor, info: Any, options: ClassifierHandler.Options) -> dict:
        """Return the ranking, and the names of the inputs, which are `info`."""
        return {**super().encode(row, info, options), "inputs": info}

    def example(self) -> Sample:
        image, _, waveform = self.nothing()
        return Sample((image, torch.ones(12, dtype=torch.int64), waveform, torch.ones(len(FIELDS), dtype=torch.bool)))
