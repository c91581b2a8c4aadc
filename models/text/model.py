"""A small ensemble that classifies the intent of a short text from its tokens and pairs of tokens."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights import load_weights

FOLDER = Path(__file__).parent
VOCABULARY = 5120
INTENTS = 150
WIDTH = 96
BUCKETS = (4001, 4003, 4007)  # a different number per member, so that different pairs of tokens collide in each
PADDING = 0


class Bag(nn.Module):
    """The mean of the embeddings of all tokens and of all hashed pairs of neighbours, then a linear layer.

    This is fastText (Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification") on subword tokens.

    Args:
        buckets: the number of embeddings for pairs; a prime number, which distributes them evenly.
    """

    def __init__(self, buckets: int):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.pairs = nn.Embedding(buckets, WIDTH)
        nn.init.normal_(self.tokens.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.pairs.weight, std=WIDTH**-0.5)
        self.drop_features = nn.Dropout(0.2)
        self.normalise = nn.LayerNorm(2 * WIDTH)
        self.drop = nn.Dropout(0.5)
        self.classify = nn.Linear(2 * WIDTH, INTENTS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute logits: ids and mask, int64 [N, T] -> float32 [N, 150]."""
        ids = input_ids * attention_mask
        following = nn.functional.pad(ids[:, 1:], [0, 1])
        pair_buckets = (ids * self.tokens.num_embeddings + following) % self.pairs.num_embeddings
        weights = attention_mask.to(self.tokens.weight.dtype)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        if self.training:
            features = self.drop_features(torch.cat([self.tokens(ids), self.pairs(pair_buckets)], dim=2))
            mean = (features * weights.unsqueeze(2)).sum(1)
        else:  # the same without a tensor of all features, in half the time
            mean = torch.cat(
                [
                    nn.functional.embedding_bag(ids, self.tokens.weight, mode="sum", per_sample_weights=weights),
                    nn.functional.embedding_bag(
                        pair_buckets, self.pairs.weight, mode="sum", per_sample_weights=weights
                    ),
                ],
                dim=1,
            )
        return self.classify(self.drop(self.normalise(mean)))


class Ensemble(nn.Module):
    """The mean of the logits of bags that were trained separately."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(Bag(buckets) for buckets in BUCKETS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute logits: ids and mask, int64 [N, T] -> float32 [N, 150]."""
        return torch.stack([member(input_ids, attention_mask) for member in self.members]).mean(0)


class IntentNet(nn.Module):
    """Classify texts into 150 intents and a 151st class, "out of scope".

    The out-of-scope logit is a constant: the threshold that the score of an intent must exceed ("max logit", Hendrycks
    et al. 2022, arXiv 1911.11132). `train.py` fits the threshold and the temperature on the validation split.
    """

    threshold: Tensor
    temperature: Tensor

    def __init__(self):
        super().__init__()
        self.intents = Ensemble()
        self.register_buffer("threshold", torch.zeros(1))
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits of texts. They do not depend on the padding.

        Args:
            input_ids: int64 [N, T], from tokenizer.json.
            attention_mask: int64 [N, T], 1 for a token, 0 for padding.

        Returns:
            float32 [N, 151]; the last class is "oos".
        """
        logits = self.intents(input_ids, attention_mask)
        return torch.cat([logits, self.threshold.expand(len(logits), 1)], dim=1) / self.temperature


def build() -> nn.Module:
    """Return the trained model, on the CPU, in evaluation mode."""
    return load_weights(IntentNet(), FOLDER / "weights.safetensors")


def example_inputs(batch_size: int) -> tuple[Tensor, ...]:
    """Return inputs of the served shape, to compare an export with the eager model: 1 to 24 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (batch_size, 1), generator=generator)
    attention_mask = (torch.arange(int(lengths.max())) < lengths).long()
    ids = torch.randint(1, VOCABULARY, attention_mask.shape, generator=generator)
    return ids * attention_mask, attention_mask
