"""Classify a sound file (WAV, FLAC, OGG or MP3): the k most probable classes."""

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from handlers.core import inputs
from handlers.core.batch import Sample
from handlers.core.explain import Explainable, ExplainedClassifier
from handlers.core.inputs import Sound
from handlers.core.settings import PositiveInt
from handlers.core.sounds import SoundLimits, loudest_window, read_sound, resample

FRAME_SECONDS = 0.01  # of one score
FRAMES_TOGETHER = 5  # of a part that is removed as a whole: about the length of a consonant
RANGE = 100  # dB, between full level and silence


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
        """Attenuate each 10 ms: from 1, as it is, to 0, which is silence.

        The scale between is that of decibels. A model of logarithmic energies hardly changes on a linear scale, until
        just before silence, and integrated gradients would need thousands of steps.
        """
        waveform = cast("Tensor", sample.tensors)
        length = round(FRAME_SECONDS * self.settings.sample_rate)
        frames = -(-len(waveform) // length)

        def arguments(levels: Tensor) -> tuple[Tensor, ...]:
            floor = 10 ** (-RANGE / 20)
            gains = (10 ** ((levels - 1) * RANGE / 20) - floor) / (1 - floor)
            return (waveform.to(levels.device) * gains.repeat_interleave(length, 1)[:, : len(waveform)],)

        def describe(attributions: Tensor) -> dict:
            return {"attributions": attributions.tolist(), "start": sample.info, "step": FRAME_SECONDS}

        def draw(attributions: Tensor, caption: str) -> bytes:
            from handlers.core import drawing  # imports Pillow, which predictions do not need

            return drawing.curve(waveform.numpy(), attributions.numpy(), self.settings.window_seconds, caption)

        return Explainable(
            inputs=(torch.ones(1, frames),),
            baselines=(torch.zeros(1, frames),),
            groups=(torch.arange(frames)[None] // FRAMES_TOGETHER,),
            arguments=arguments,
            describe=describe,
            draw=draw,
            windows=((2 * FRAMES_TOGETHER,),),
        )
