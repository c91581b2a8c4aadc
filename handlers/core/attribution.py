"""The methods of Captum, each called with what fits a worker: batches of a known size, and features in groups.

Grad-CAM is computed here: Captum's needs hooks, which a module that was loaded from TorchScript does not call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from captum._utils.models.model import Model
from captum.attr import (
    FeatureAblation,
    IntegratedGradients,
    KernelShap,
    Lime,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from torch import Tensor
from torch.nn.functional import interpolate

EVALUATIONS = 400  # of shapley_value_sampling by default: permutations x features
KERNEL_WIDTH = 0.25  # of LIME, in cosine distance, as its authors set it for texts

Attributions = tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """One input to explain. Each method returns attributions in the shapes of `inputs`.

    Attributes:
        scores: [N, ...] of each input -> [N].
        inputs: [1, ...] each.
        baselines: in the same shapes.
        groups: in the same shapes; see `Explainable`.
        windows: for occlusion.
        batch_size: the largest N.
        activations: for Grad-CAM, [N, ...] of each input -> the scores, [N], and activations of a layer, [N, C, H, W].
    """

    scores: Callable[..., Tensor]
    inputs: Attributions
    baselines: Attributions
    groups: Attributions
    windows: tuple[tuple[int, ...], ...] | None
    batch_size: int
    activations: Callable[..., tuple[Tensor, Tensor]] | None = None

    def integrated_gradients(self, steps: int) -> Attributions:
        return IntegratedGradients(self.scores).attribute(
            self.inputs, self.baselines, n_steps=steps, internal_batch_size=self.batch_size
        )

    def saliency(self, _: int | None = None) -> Attributions:
        leaves = tuple(each.clone().requires_grad_() for each in self.inputs)
        return Saliency(self.scores).attribute(leaves)

    def grad_cam(self, _: int | None = None) -> Attributions:
        """Weight each channel of the layer by its mean gradient (Selvaraju et al. 2017)."""
        assert self.activations, "only models with a named layer list this method"
        [image] = self.inputs
        # optimised, TorchScript may differentiate what lies before and behind the layer in one step, and the layer's
        # activations get no gradient
        with torch.jit.optimized_execution(False):
            scores, activations = self.activations(image.clone().requires_grad_())
        [gradients] = torch.autograd.grad(scores.sum(), activations)
        heat = (gradients.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True).relu()
        heat = interpolate(heat, image.shape[2:], mode="bilinear")
        return (heat.expand_as(image) / image.size(1),)  # shared among the channels, which are added up later

    def occlusion(self, _: int | None = None) -> Attributions:
        assert self.windows
        strides = tuple(tuple(max(1, side // 2) for side in window) for window in self.windows)
        return Occlusion(self.scores).attribute(
            self.inputs, self.windows, strides, self.baselines, perturbations_per_eval=self.batch_size
        )

    def feature_ablation(self, _: int | None = None) -> Attributions:
        return self.shared(FeatureAblation(self.scores).attribute(self.inputs, self.baselines, **self.removal()))

    def shapley_value_sampling(self, permutations: int | None = None) -> Attributions:
        method = ShapleyValueSampling(self.scores)
        permutations = permutations or max(4, min(25, EVALUATIONS // self.features))
        return self.shared(method.attribute(self.inputs, self.baselines, n_samples=permutations, **self.removal()))

    def kernel_shap(self, samples: int | None = None) -> Attributions:
        method = KernelShap(self.scores)
        method.interpretable_model = LeastSquares()  # Captum's own needs scikit-learn
        return self.shared(
            method.attribute(self.inputs, self.baselines, n_samples=samples or self.perturbations, **self.removal())
        )

    def lime(self, samples: int | None = None) -> Attributions:
        method = Lime(self.scores, LeastSquares(ridge=1e-2), closeness)
        return self.shared(
            method.attribute(self.inputs, self.baselines, n_samples=samples or self.perturbations, **self.removal())
        )

    @property
    def features(self) -> int:
        return 1 + max(int(each.max()) for each in self.groups)

    @property
    def perturbations(self) -> int:
        """The default number of samples of a regression: a few for each coefficient."""
        return max(100, 3 * self.features)

    def removal(self) -> dict:
        return {"feature_mask": self.groups, "perturbations_per_eval": self.batch_size}

    def shared(self, attributions: Attributions) -> Attributions:
        """Share the attribution of a group among its values, so that the sum over all values is right."""
        sizes = torch.bincount(torch.cat([each.flatten() for each in self.groups]))
        return tuple(each / sizes[group] for each, group in zip(attributions, self.groups, strict=True))


def closeness(_original: object, _perturbed: object, kept: Tensor, **_: object) -> Tensor:
    """Return LIME's weight of a sample, from the share of the features that it keeps."""
    distance = 1 - kept.float().mean().sqrt()
    return torch.exp(-((distance / KERNEL_WIDTH) ** 2))


class LeastSquares(Model):
    """A weighted linear regression, in the form that Captum's `Lime` takes.

    Args:
        ridge: the penalty on the squares of the coefficients.
    """

    def __init__(self, ridge: float = 0.0):
        self.ridge = ridge
        self.coefficients = torch.empty(0)

    def fit(self, train_data, **_: object) -> dict:
        """Fit to batches of features [N, F], values [N] and weights [N]."""
        columns = [torch.cat(each).double().cpu() for each in zip(*train_data, strict=True)]
        features, values, weights = columns[0], columns[1].flatten(), columns[2].flatten().sqrt()
        design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.double)], dim=1) * weights[:, None]
        penalty = torch.eye(design.shape[1], dtype=torch.double) * self.ridge**0.5
        penalty[-1] = 0  # the intercept has none
        target = torch.cat([values * weights, torch.zeros(len(penalty), dtype=torch.double)])
        solution = torch.linalg.lstsq(torch.cat([design, penalty]), target[:, None], driver="gelsd").solution
        self.coefficients = solution[:-1, 0].float()
        return {}

    def representation(self) -> Tensor:
        return self.coefficients[None]

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # of the interface; Captum's Lime reads the coefficients only
