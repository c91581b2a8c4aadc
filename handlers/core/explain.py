"""Explain a classifier's answer: how much each part of an input adds to the score of a class (Captum).

The score is the logarithm of the class's probability: what raises it speaks for the class against all others. Captum,
and the original module that can be differentiated, are loaded at the first explanation. A worker that never explains
pays nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from handlers.core import admission, inputs
from handlers.core.classifier import ClassifierHandler
from handlers.core.errors import InvalidOption, NonFiniteOutput, UnsupportedOperation
from handlers.core.outputs import main_output
from handlers.core.request import Request
from handlers.core.slots import Picture, Sample

STEPS, MOST_STEPS = (50, 200), 400  # of the integral: without `n_steps`, 50; if the gap is not small, 200
SMALL_GAP = 0.05  # of the difference between the scores of input and baseline
GRADIENTS = ("integrated_gradients", "saliency")
REMOVALS = ("feature_ablation", "shapley_value_sampling", "kernel_shap", "lime")
COMPLETE = ("integrated_gradients", "shapley_value_sampling", "kernel_shap")  # their sum is promised

Attributions = tuple[Tensor, ...]


class ExplanationOptions(inputs.PictureOptions):
    """The options of a request for an explanation."""

    method: str | None = None  # by default, the first of those that the model can do
    target: int | str | None = None  # a class index or a label; by default, the predicted class
    n_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    n_samples: Annotated[int, Field(ge=1, le=1000)] | None = None


@dataclass(frozen=True)
class Explainable:
    """One sample, in a form to which scores can be attributed.

    Attributes:
        inputs: float32 [1, ...] each. The attributions have their shapes.
        baselines: the inputs without their content, such as a blank image, in the same shapes.
        groups: int64, in the same shapes; values of one number are removed together. The numbers start at 0 and are
            consecutive over all inputs.
        arguments: [N, ...] of each input -> the module's arguments for N samples.
        describe: attributions, each [...] -> what the answer says of them, JSON values by name.
        draw: attributions, each [...], and a caption -> the PNG file.
        differentiable: whether `arguments` can be differentiated.
        windows: for occlusion, the shape [...] of the window in each input; its stride is half of it.
    """

    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    arguments: Callable[..., tuple[Tensor, ...]]
    describe: Callable[..., dict[str, JsonValue]]
    draw: Callable[..., bytes]
    differentiable: bool = True
    windows: tuple[tuple[int, ...], ...] | None = None

    @property
    def methods(self) -> list[str]:
        """The methods that fit the inputs, the default first."""
        gradients = GRADIENTS if self.differentiable else ()
        preferred = () if self.differentiable else ("shapley_value_sampling",)
        return list(dict.fromkeys([*gradients, *preferred, *REMOVALS, *(["occlusion"] if self.windows else [])]))


@dataclass(frozen=True)
class Explanation:
    """What a method found.

    Attributes:
        target: the class index.
        method: its name.
        probability: of the target.
        score: of the input, the logarithm of the probability.
        baseline_score: of the baselines.
        attributions: float32, in the shapes of `Explainable.inputs` without the first dimension, on the host.
    """

    target: int
    method: str
    probability: float
    score: float
    baseline_score: float
    attributions: Attributions

    @property
    def is_finite(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.attributions)

    @property
    def completeness_gap(self) -> float:
        """The sum of the attributions, less the difference that they should explain."""
        total = sum(each.double().sum().item() for each in self.attributions)
        return total - (self.score - self.baseline_score)


class ExplainedClassifier(ClassifierHandler):
    """A classifier whose answers can be explained. A subclass also defines `explainable`."""

    ExplainOptions = ExplanationOptions

    def explainable(self, sample: Sample) -> Explainable:
        """Return a sample as something to explain. `sample.inputs` has the inputs that it was decoded from.

        The functions `describe` and `draw` should leave their work until they are called.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `explainable`, or derive from ClassifierHandler")

    @functools.cached_property
    def original(self) -> torch.jit.ScriptModule:
        """The archive's module in float32: the served one is frozen, and may compute in another precision."""
        module = torch.jit.load(self.model_pt_path, map_location=self.device).eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)  # only the gradients of inputs are needed
        return module

    @functools.cached_property
    def methods(self) -> list[str]:
        """What this model can do: methods with gradients only if the module has them."""
        example = self.explainable(self.example())
        return [name for name in example.methods if name not in GRADIENTS or self.has_gradients(example)]

    def has_gradients(self, example: Explainable) -> bool:
        original = self.original
        with torch.enable_grad():
            moved = [each.to(self.device).requires_grad_() for each in example.inputs]
            try:
                scores = main_output(original(*example.arguments(*moved)))
            except RuntimeError:  # such as a module that takes nothing but bytes
                return False
            return scores.requires_grad

    def read(self, row: dict, headers: Mapping) -> Request:
        request = super().read(row, headers)
        options = request.options
        if isinstance(options, ExplanationOptions):
            if options.method is not None and options.method not in self.methods:
                raise InvalidOption(f"method must be one of {', '.join(self.methods)}.")
            if options.target is not None:
                self.class_index(options.target)
        return request

    def class_index(self, target: int | str) -> int:
        """Return the class that the option `target` means.

        Raises:
            InvalidOption: the model has no such class.
        """
        if isinstance(target, str) and target in self.labels:
            return self.labels.index(target)
        if isinstance(target, str) and target.isascii() and target.isdigit() and len(target) < 10:
            target = int(target)  # the text of a form field
        if isinstance(target, int) and 0 <= target < len(self.labels):
            return target
        raise InvalidOption(f"target must be a class index from 0 to {len(self.labels) - 1}, or a label of the model.")

    def explain(self, sample: Sample, options: ExplanationOptions) -> JsonValue | Picture:
        explainable = self.explainable(sample)
        found = self.attribute(explainable, options, self.explain_deadline)
        if not math.isfinite(found.score):
            raise NonFiniteOutput("The model's output for this input is not a finite number.")
        if options.method is None and not found.is_finite:  # gradients at a sound's silence, for example
            ablation = options.model_copy(update={"method": "feature_ablation"})
            found = self.attribute(explainable, ablation, self.explain_deadline)
        if not found.is_finite:
            others = ", ".join(name for name in self.methods if name not in GRADIENTS)
            raise UnsupportedOperation(f"{found.method} is not finite for this input. Use another method: {others}.")
        label = self.labels[found.target]
        if options.format == "png":
            return Picture(explainable.draw(*found.attributions, f"{label}: {found.probability:.1%} ({found.method})"))
        scores = {"score": found.score, "baseline_score": found.baseline_score}
        return {
            "target": {"label": label, "class": found.target, "probability": found.probability, **scores},
            "method": found.method,
            **explainable.describe(*found.attributions),
            **({"completeness_gap": found.completeness_gap} if found.method in COMPLETE else {}),
        }

    def log_probabilities(self, explainable: Explainable, parts: Attributions) -> Tensor:
        """Return the scores of all classes, float32 [N, classes], for [N, ...] of each input, on the device."""
        outputs = main_output(self.original(*explainable.arguments(*parts))).float()
        return outputs.log_softmax(1) if self.settings.outputs == "logits" else outputs.clamp_min(1e-9).log()

    def attribute(
        self, explainable: Explainable, options: ExplanationOptions, deadline: admission.Deadline
    ) -> Explanation:
        """Attribute the score of a class to the parts of an input. Equal calls have equal results.

        Raises:
            Overloaded: the deadline has passed.
        """
        from handlers.core import attribution  # imports Captum, which takes a second

        parts, blank, groups = (
            tuple(each.to(self.device) for each in tensors)
            for tensors in (explainable.inputs, explainable.baselines, explainable.groups)
        )
        with torch.no_grad():
            of_input, of_baseline = (self.log_probabilities(explainable, each)[0] for each in (parts, blank))
        target = int(of_input.argmax()) if options.target is None else self.class_index(options.target)
        score, baseline_score = of_input[target].item(), of_baseline[target].item()
        method = options.method or self.methods[0]

        def scores(*changed: Tensor) -> Tensor:
            deadline.check()  # Captum calls this for each batch of its work
            return self.log_probabilities(explainable, changed)[:, target]

        def found(attributions: Attributions) -> Explanation:
            host = tuple(each.detach()[0].float().cpu() for each in attributions)
            return Explanation(target, method, of_input[target].exp().item(), score, baseline_score, host)

        run = attribution.Run(scores, parts, blank, groups, explainable.windows, self.run_size)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            if method != "integrated_gradients":
                return found(getattr(run, method)(options.n_samples))
            for steps in [options.n_steps] if options.n_steps else STEPS:
                explanation = found(run.integrated_gradients(steps))
                if abs(explanation.completeness_gap) <= SMALL_GAP * abs(score - baseline_score):
                    break
            return explanation
