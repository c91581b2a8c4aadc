"""Classify a sound file (WAV, FLAC, OGG or MP3): the k most probable classes."""

from typing import cast

import torch
from torch import Tensor

from handlers.core import answers, inputs
from handlers.core.batch import Sample
from handlers.core.curves import explainable_sound
from handlers.core.declared import TakesTensors, TensorInput
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.inputs import Sound
from handlers.core.sounds import SoundWindow, read_window


class AudioMFCCHandler(ExplainedClassifier, TakesTensors):
    """Model: waveforms float32 [N, window] (mono, in [-1, 1]) -> logits [N, classes]. It computes the MFCC itself.

    A clip shorter than the model's window is padded with silence on both sides. Of a longer clip, only the loudest
    window is classified: the answer is one word, and its cost does not grow with the length of the clip.
    """

    class Settings(ExplainedClassifier.Settings, SoundWindow):
        pass

    settings: Settings

    class Inputs(inputs.Inputs):
        data: Sound

    ExplainAnswer = answers.SoundExplanation

    def decode(self, inputs: Inputs) -> Sample:
        """Decode a sound file into a waveform, float32 [window]; `info` is its start in the clip, in seconds."""
        return Sample(*read_window(inputs.data, self.settings))

    def tensor_inputs(self) -> tuple[TensorInput, ...]:
        return (TensorInput("waveform", "FP32", (self.settings.window,)),)

    def example(self) -> Sample:
        return Sample(torch.zeros(self.settings.window))

    def explainable(self, sample: Sample) -> Explainable:
        """Compare with silence."""
        waveform, start = cast("tuple[Tensor, float]", (sample.tensors, sample.info))
        return explainable_sound(waveform, start, self.settings.sample_rate)
