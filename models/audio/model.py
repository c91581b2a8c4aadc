"""A small residual network for spoken commands of one second."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchaudio.functional import create_dct
from torchaudio.transforms import MFCC

from models.weights import load_weights

FOLDER = Path(__file__).parent
SAMPLE_RATE = 16_000  # Hz
SAMPLES = 16_000  # one second
CLASSES = 12
CEPSTRA = 40
BANDS = 40
WIDTHS = (16, 32, 64, 64, 128)


class KeywordNet(nn.Module):
    """Residual classifier of spectral envelopes (after Tang and Lin, arXiv 1710.10361).

    The model computes loudness, cepstra and envelopes itself: on the device, for a whole batch at once.
    """

    cosines: Tensor

    def __init__(self):
        super().__init__()
        self.min_loudness = 1e-4  # root mean square (-80 dB of full scale); quieter clips are not amplified fully
        spectrum = {"n_fft": 512, "win_length": 480, "hop_length": 160, "n_mels": 64, "f_min": 20.0, "f_max": 7600.0}
        # logarithms, because decibels are limited relative to the loudest clip of the batch
        self.mfcc = MFCC(SAMPLE_RATE, n_mfcc=CEPSTRA, log_mels=True, melkwargs=spectrum)
        self.register_buffer("cosines", create_dct(CEPSTRA, BANDS, norm="ortho"))
        self.standardise = nn.BatchNorm1d(BANDS)
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Residual(i, o) for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)))
        self.classify = nn.Linear(WIDTHS[-1] * 3, CLASSES)

    def envelopes(self, waveforms: Tensor) -> Tensor:
        """Compute 40 bands of 30 ms windows, 10 ms apart: float32 [N, T] -> float32 [N, 40, T // 160 + 1].

        They do not depend on the gain. The higher cepstra, which describe the pitch of the voice, are left out. The
        others are turned back into bands, because convolutions need neighbouring frequencies, which cepstra are not.
        """
        loudness = waveforms.square().mean(dim=-1, keepdim=True).sqrt()
        return self.cosines @ self.cepstra(waveforms / (loudness + self.min_loudness))

    def cepstra(self, waveforms: Tensor) -> Tensor:
        """Compute the cepstra as `self.mfcc` does, in half the time: float32 [N, T] -> float32 [N, 40, T // 160 + 1].

        `self.mfcc` takes the magnitude of each complex number and squares it. Here the squares of the real and the
        imaginary parts are separate columns, and the filter bank adds them up.
        """
        spectrogram = self.mfcc.MelSpectrogram.spectrogram
        spectrum = torch.stft(
            waveforms,
            spectrogram.n_fft,
            spectrogram.hop_length,
            spectrogram.win_length,
            spectrogram.window,
            return_complex=True,
        )
        squares = torch.view_as_real(spectrum.transpose(1, 2)).flatten(2).square()
        bands = squares @ self.mfcc.MelSpectrogram.mel_scale.fb.repeat_interleave(2, dim=0)
        return (torch.log(bands + 1e-6) @ self.mfcc.dct_mat).transpose(1, 2)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Classify waveforms, float32 [N, 16000], mono, 16 kHz, in [-1, 1] -> logits float32 [N, 12]."""
        features = self.standardise(self.envelopes(waveforms)).unsqueeze(1)
        features = self.blocks(self.stem(features))
        return self.classify(features.mean(dim=-1).flatten(1))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; they halve the resolution if they change the width."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.convolve = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.convolve(features) + self.shortcut(features))


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(KeywordNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch_size, SAMPLES, generator=generator) * 2 - 1,)
