"""Classify a sound file (WAV, FLAC, OGG or MP3): the k most probable classes."""

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.curves import explainable_sound
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.inputs import Sound
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundLimits, loudest_window, read_sound, resample


class AudioMFCCHandler(ExplainedClassifier):
    """Model: waveforms float32 [N, window] (mono, in [-1, 1]) -> logits [N, classes]. It computes the MFCC itself.

    A clip shorter than the model's window is padded with silence on both sides. Of a longer clip, only the loudest
    window is classified: the answer is one word, and its cost does not grow with the length of the clip.
    """

    class Settings(ExplainedClassifier.Settings, SoundLimits):
        sample_rate: PositiveInt = 16_000  # Hz, of the model
        window_seconds: Annotated[float, Field(gt=0)] = 1.0  # of the model

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Sound

    def decode(self, inputs: Inputs) -> Sample:
        """Decode a sound file into a waveform, float32 [window]; `info` is its start in the clip, in seconds."""
        waveform = resample(*read_sound(inputs.data, self.settings), self.settings.sample_rate)
        waveform = waveform - waveform.mean()  # a constant offset of the microphone is not sound
        samples, start = loudest_window(waveform, self.window)
        return Sample(torch.from_numpy(samples), start / self.settings.sample_rate)

    @property
    def window(self) -> int:
        """The length of the model's window, in samples."""
        return round(self.settings.window_seconds * self.settings.sample_rate)

    def example(self) -> Sample:
        return Sample(torch.zeros(self.window))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with silence."""
        waveform, start = cast("tuple[Tensor, float]", (sample.tensors, sample.info))
        return explainable_sound(waveform, start, self.settings.sample_rate)
