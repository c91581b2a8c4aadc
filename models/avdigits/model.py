"""A network that recognises a digit from any of its picture, its spoken name, and a few written words."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.audio.model import SAMPLES, KeywordNet
from models.mnist.model import CLASSES, SIZE, DigitNet
from models.weights import load_weights

FOLDER = Path(__file__).parent
INPUTS = ("image", "text", "audio")  # the columns of `present`
LETTERS = 257  # the bytes of UTF-8, each plus one; 0 is padding
TEXT_WIDTH = 64


class AnyDigitNet(nn.Module):
    """Three encoders, one per input, whose evidence is added up (a product of experts, Hinton 2002).

    Given the digit, its picture, its sound and its name are independent of each other. So the logarithms of their
    probabilities add up, and an input that is missing adds nothing. An encoder that is unsure has small logits.
    """

    def __init__(self):
        super().__init__()
        self.image = DigitNet()
        self.text = WordNet()
        self.audio = KeywordNet()
        self.audio.classify = nn.Linear(self.audio.classify.in_features, CLASSES)

    def evidence(self, images: Tensor, texts: Tensor, waveforms: Tensor) -> Tensor:
        """Return the logits of each encoder, float32 [N, 3, 10], in the order of `INPUTS`."""
        return torch.stack([self.image(images), self.text(texts), self.audio(waveforms)], dim=1)

    def forward(self, images: Tensor, texts: Tensor, waveforms: Tensor, present: Tensor) -> Tensor:
        """Classify digits.

        Args:
            images: uint8 [N, 1, 28, 28], bright ink on black.
            texts: int64 [N, T], the bytes of UTF-8, each plus one; 0 is padding.
            waveforms: float32 [N, 16000], mono, 16 kHz, in [-1, 1].
            present: bool [N, 3], which of the three each sample has. The content of the others has no effect.

        Returns:
            logits float32 [N, 10].
        """
        evidence = self.evidence(images, texts, waveforms)
        return torch.where(present.unsqueeze(2), evidence, torch.zeros_like(evidence)).sum(dim=1)


class WordNet(nn.Module):
    """Find the name of a digit anywhere in a text: two convolutions over its letters, and their maximum.

    Letters instead of words, because a word with a typing error is still mostly the same letters.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(LETTERS, TEXT_WIDTH, padding_idx=0)
        self.spell = nn.Conv1d(TEXT_WIDTH, 2 * TEXT_WIDTH, 5, padding=2)
        self.read = nn.Conv1d(2 * TEXT_WIDTH, 2 * TEXT_WIDTH, 5, padding=2)
        self.classify = nn.Linear(2 * TEXT_WIDTH, CLASSES)

    def forward(self, texts: Tensor) -> Tensor:
        """Classify texts, int64 [N, T] -> logits float32 [N, 10]. Padding has no effect."""
        letters = (texts > 0).unsqueeze(1)
        features = torch.relu(self.spell(self.embed(texts).transpose(1, 2))) * letters
        features = torch.relu(self.read(features)) * letters
        return self.classify(features.amax(dim=2))


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(AnyDigitNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, 256, (batch_size, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        torch.randint(0, LETTERS, (batch_size, 12), generator=generator),
        torch.rand(batch_size, SAMPLES, generator=generator) * 2 - 1,
        torch.ones(batch_size, len(INPUTS), dtype=torch.bool),
    )
