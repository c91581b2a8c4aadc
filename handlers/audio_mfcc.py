"""Sound classification: WAV, FLAC, OGG or MP3 -> the k most probable classes."""

from typing import Annotated

import torch
from pydantic import Field

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.classifier import ClassifierHandler
from handlers.core.inputs import Sound
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundLimits, loudest_window, read_sound, resample


class AudioMFCCHandler(ClassifierHandler):
    """Model: waveforms float32 [N, window] (mono, in [-1, 1]) -> logits [N, classes]; it computes its MFCC by itself.

    A clip shorter than the model's window stands in the middle of silence. Of a longer clip, the loudest window is
    heard: the answer is one word, and its cost does not grow with the clip.
    """

    class Settings(ClassifierHandler.Settings, SoundLimits):
        sample_rate: PositiveInt = 16_000  # Hz, of the model
        window_seconds: Annotated[float, Field(gt=0)] = 1.0  # of the model

    class Inputs(inputs.Inputs):
        data: Sound

    def decode(self, inputs: Inputs) -> Sample:
        """Make a waveform, float32 [window]."""
        waveform = resample(*read_sound(inputs.data, self.settings), self.settings.sample_rate)
        waveform = waveform - waveform.mean()  # a microphone's constant offset is no sound
        return Sample(torch.from_numpy(loudest_window(waveform, self.window)))

    @property
    def window(self) -> int:
        """The model's window, in samples."""
        return round(self.settings.window_seconds * self.settings.sample_rate)

    def example(self) -> Sample:
        return Sample(torch.zeros(self.window))
