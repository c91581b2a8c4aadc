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
    """Residual classifier (after Tang and Lin, arXiv 1710.10361) of the spectral envelopes that cepstra describe.

    Loudness, cepstra and envelopes are computed in here, so that waveforms travel to the device and a whole batch is
    transformed at once.
    """

    cosines: Tensor

    def __init__(self):
        super().__init__()
        self.faintest = 1e-4  # root mean square (-80 dB of full scale) under which a clip is not made as loud as others
        spectrum = {"n_fft": 512, "win_length": 480, "hop_length": 160, "n_mels": 64, "f_min": 20.0, "f_max": 7600.0}
        # decibels would be cut off relative to the loudest of the batch; logarithms keep clips independent
        self.mfcc = MFCC(SAMPLE_RATE, n_mfcc=CEPSTRA, log_mels=True, melkwargs=spectrum)
        self.register_buffer("cosines", create_dct(CEPSTRA, BANDS, norm="ortho"))
        self.standardise = nn.BatchNorm1d(BANDS)
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Residual(i, o) for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)))
        self.classify = nn.Linear(WIDTHS[-1] * 3, CLASSES)

    def envelopes(self, waveforms: Tensor) -> Tensor:
        """float32 [N, T] -> float32 [N, 40, T // 160 + 1]: 40 bands of 30 ms windows, 10 ms apart, whatever the gain.

        The higher cepstra, which hold the voice's pitch, are left out; turning the others back into bands gives
        convolutions the neighbourhoods along frequency that cepstra lack.
        """
        loudness = waveforms.square().mean(dim=-1, keepdim=True).sqrt()
        return self.cosines @ self.cepstra(waveforms / (loudness + self.faintest))

    def cepstra(self, waveforms: Tensor) -> Tensor:
        """float32 [N, T] -> float32 [N, 40, T // 160 + 1]: what `self.mfcc` computes, in half the time.

        It takes the root of each number's power and squares it again. Here the squares of real and imaginary parts
        stand side by side, and the filter bank sums them.
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
        """waveforms: float32 [N, 16000], mono, 16 kHz, in [-1, 1] -> logits float32 [N, 12]."""
        features = self.standardise(self.envelopes(waveforms)).unsqueeze(1)
        features = self.blocks(self.stem(features))
        return self.classify(features.mean(dim=-1).flatten(1))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; halves the resolution where it changes the width."""

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
    """The trained model, on the CPU, in evaluation mode."""
    return load_weights(KeywordNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Inputs of the served shape, for comparing an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch_size, SAMPLES, generator=generator) * 2 - 1,)
