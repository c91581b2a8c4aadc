"""Explain the answers to sounds: a score per 10 ms of the model's window."""

import torch
from torch import Tensor

from handlers.core.explain import Explainable

FRAME_SECONDS = 0.01  # of one score
FRAMES_TOGETHER = 5  # of a part that is removed as a whole: about the length of a consonant
RANGE = 100  # dB, between full level and silence


def explainable_sound(waveform: Tensor, start: float, sample_rate: int) -> Explainable:
    """Return a sound as something to explain: each 10 ms is attenuated, from 1, as it is, to 0, which is silence.

    The scale between is that of decibels. A model of logarithmic energies hardly changes on a linear scale, until
    just before silence, and integrated gradients would need thousands of steps.

    Args:
        waveform: float32 [window].
        start: of the window in the clip, in seconds.
        sample_rate: in Hz.
    """
    length = round(FRAME_SECONDS * sample_rate)
    frames = -(-len(waveform) // length)

    def arguments(levels: Tensor) -> tuple[Tensor, ...]:
        floor = 10 ** (-RANGE / 20)
        gains = (10 ** ((levels - 1) * RANGE / 20) - floor) / (1 - floor)
        return (waveform.to(levels.device) * gains.repeat_interleave(length, 1)[:, : len(waveform)],)

    def describe(attributions: Tensor) -> dict:
        return {"attributions": attributions.tolist(), "start": start, "step": FRAME_SECONDS}

    def draw(attributions: Tensor, caption: str) -> bytes:
        from handlers.core import drawing  # imports Pillow, which predictions do not need

        return drawing.curve(waveform.numpy(), attributions.numpy(), len(waveform) / sample_rate, caption)

    return Explainable(
        inputs=(torch.ones(1, frames),),
        baselines=(torch.zeros(1, frames),),
        groups=(torch.arange(frames)[None] // FRAMES_TOGETHER,),
        arguments=arguments,
        describe=describe,
        draw=draw,
        windows=((2 * FRAMES_TOGETHER,),),
    )
