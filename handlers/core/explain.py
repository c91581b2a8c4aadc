"""Explain an answer: how much each part of an input adds to the score of a class (Captum).

A classifier's score is the logarithm of the class's probability: what raises it speaks for the class against all
others. Captum, and the original module that can be differentiated, are loaded at the first explanation. A worker that
never explains pays nothing.
"""

import abc
import functools
import importlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from handlers.core import admission, answers, inputs
from handlers.core.classifier import ClassifierHandler
from handlers.core.errors import InvalidOption, NonFiniteOutput, UnsupportedOperation
from handlers.core.labelled import LabelledHandler
from handlers.core.outputs import Outputs, main_output
from handlers.core.request import Request
from handlers.core.slots import Picture, Sample

STEPS, MOST_STEPS = (50, 200), 400  # of the integral: without `n_steps`, 50; if the gap is not small, 200
SMALL_GAP = 0.05  # of the difference between the scores of input and baseline
GRADIENTS = ("integrated_gradients", "saliency", "grad_cam")
REMOVALS = ("feature_ablation", "shapley_value_sampling", "kernel_shap", "lime")
COMPLETE = ("integrated_gradients", "shapley_value_sampling", "kernel_shap")  # their sum is promised
LEGENDS = {"saliency": "red: what it depends on", "grad_cam": "red speaks for it"}  # these are never negative
WITH_ACTIVATIONS = "with_activations"  # method of a module: its outputs, and the activations of a layer, [N, C, H, W]

Attributions = tuple[Tensor, ...]


class ExplanationOptions(inputs.PictureOptions):
    """The options of a request for an explanation."""

    method: Annotated[str | None, Field(description="By default, the first that the model can do.")] = None
    # a label may be a number, too
    target: Annotated[
        Annotated[str | int, Field(union_mode="left_to_right")] | None,
        Field(description="A class index or a label. By default, the predicted class."),
    ] = None
    n_steps: Annotated[
        Annotated[int, Field(ge=1, le=MOST_STEPS)] | None, Field(description="Steps of integrated gradients.")
    ] = None
    n_samples: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | None, Field(description="Samples of the methods that remove parts.")
    ] = None


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
        boxes: for detectors, the box to explain of each class, x1, y1, x2, y2 in the image's pixels. `draw` then gets
            the target's as `box`.
        preferred: the default method; by default, one with gradients, or else Shapley values.
        steps: of integrated gradients, as `STEPS`.
        class_scores: the module's outputs for N samples -> the score of each class, [N, classes]; by default, those of
            the handler.
    """

    inputs: tuple[Tensor, ...]
    baselines: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    arguments: Callable[..., tuple[Tensor, ...]]
    describe: Callable[..., dict[str, JsonValue]]
    draw: Callable[..., bytes]
    differentiable: bool = True
    windows: tuple[tuple[int, ...], ...] | None = None
    boxes: list[list[float]] | None = None
    preferred: str | None = None
    steps: tuple[int, ...] = STEPS
    class_scores: Callable[[Outputs], Tensor] | None = None

    @property
    def methods(self) -> list[str]:
        """The methods that fit the inputs, the default first."""
        is_image = len(self.inputs) == 1 and self.inputs[0].ndim == 4
        gradients = [name for name in GRADIENTS if self.differentiable and (is_image or name != "grad_cam")]
        first = self.preferred or (GRADIENTS[0] if self.differentiable else "shapley_value_sampling")
        return list(dict.fromkeys([first, *gradients, *REMOVALS, *(["occlusion"] if self.windows else [])]))


@dataclass(frozen=True)
class Explanation:
    """What a method found.

    Attributes:
        target: the class index.
        method: its name.
        score: of the input.
        baseline_score: of the baselines.
        attributions: float32, in the shapes of `Explainable.inputs` without the first dimension, on the host.
    """

    target: int
    method: str
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


class ExplainedHandler(LabelledHandler):
    """A handler of classes with labels whose answers can be explained.

    A subclass also defines `explainable`, and `class_scores` unless `Explainable.class_scores` is set.
    """

    ExplainOptions = ExplanationOptions
    ExplainAnswer: Any = answers.Explanation
    least_score = -math.inf  # of a class that can be explained

    @abc.abstractmethod
    def explainable(self, sample: Sample) -> Explainable:
        """Return a sample as something to explain. `sample.inputs` has the inputs that it was decoded from.

        The functions `describe` and `draw` should leave their work until they are called.
        """

    def class_scores(self, outputs: Outputs) -> Tensor:
        """Return the score of each class, float32 [N, classes], for the module's outputs of N samples."""
        raise NotImplementedError(f"{type(self).__name__} must define `class_scores`")

    def predicted(self, score: Tensor, baseline_score: Tensor) -> int:
        """Return the class to explain if a request names none, from the scores of all classes, [classes] each."""
        return int(score.argmax())

    def probability(self, score: float) -> float:
        """Return what a score means, from 0 to 1."""
        return score

    def describe_target(self, explanation: Explanation) -> dict[str, JsonValue]:
        """Return what the answer says of the class, beside its label and its index."""
        return {"score": explanation.score, "baseline_score": explanation.baseline_score}

    @functools.cached_property
    def original(self) -> torch.jit.ScriptModule:
        """The archive's module in float32: the served one is frozen, and may compute in another precision."""
        module = torch.jit.load(self.model_pt_path, map_location=self.device).eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)  # only the gradients of inputs are needed
        return module

    @functools.cached_property
    def gradients(self) -> bool:
        """Whether the original module can be differentiated, by any of its inputs that are continuous."""
        example = self.explainable(self.example())
        with torch.enable_grad():
            moved = tuple(each.to(self.device).requires_grad_() for each in example.inputs)
            try:
                return self.scores(example, moved).requires_grad
            except RuntimeError:  # such as a module that takes nothing but bytes
                return False

    def methods(self, explainable: Explainable | None = None) -> list[str]:
        """Return what this model can do with an input, the default first; without one, with the handler's example."""
        explainable = explainable or self.explainable(self.example())
        impossible: tuple[str, ...] = () if self.gradients else GRADIENTS
        if not hasattr(self.original, WITH_ACTIVATIONS):
            impossible += ("grad_cam",)
        return [name for name in explainable.methods if name not in impossible]

    def read(self, row: dict, headers: Mapping) -> Request:
        request = super().read(row, headers)
        if isinstance(request.options, ExplanationOptions) and request.options.target is not None:
            self.class_index(request.options.target)
        return request

    def option_limits(self, labels: list[str]) -> dict[str, dict]:
        index = {"type": "integer", "minimum": 0, "maximum": len(labels) - 1}
        return super().option_limits(labels) | {"target": {"anyOf": [{"enum": labels}, index]}}

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
        started = time.monotonic()
        # with Captum, at a worker's first explanation: on a busy machine, this alone can take `max_explain_seconds`
        importlib.import_module("handlers.core.attribution")
        self.explain_deadline = self.explain_deadline.later(time.monotonic() - started)
        explainable = self.explainable(sample)
        found = self.attribute(explainable, options, self.explain_deadline)
        if not math.isfinite(found.score):
            raise NonFiniteOutput("The model's output for this input is not a finite number.")
        if options.method is None and not found.is_finite:  # gradients at a sound's silence, for example
            ablation = options.model_copy(update={"method": "feature_ablation"})
            found = self.attribute(explainable, ablation, self.explain_deadline)
        if not found.is_finite:
            others = ", ".join(name for name in explainable.methods if name not in GRADIENTS)
            raise UnsupportedOperation(f"{found.method} is not finite for this input. Use another method: {others}.")
        label = self.labels[found.target]
        place: dict[str, Any] = {"box": explainable.boxes[found.target]} if explainable.boxes else {}
        if options.format == "png":
            legend = LEGENDS.get(found.method, "red speaks for it, blue against it")
            caption = f"{label}: {self.probability(found.score):.1%}; {legend} ({found.method.replace('_', ' ')})"
            return Picture(explainable.draw(*found.attributions, caption, **place))
        return {
            "target": {"label": label, "class": found.target, **self.describe_target(found), **place},
            "method": found.method,
            **explainable.describe(*found.attributions),
            **({"completeness_gap": found.completeness_gap} if found.method in COMPLETE else {}),
        }

    def scores(self, explainable: Explainable, parts: Attributions) -> Tensor:
        """Return the scores of all classes, float32 [N, classes], for [N, ...] of each input, on the device."""
        outputs = self.original(*explainable.arguments(*parts))
        return (explainable.class_scores or self.class_scores)(outputs)

    def scores_and_activations(self, explainable: Explainable, parts: Attributions) -> tuple[Tensor, Tensor]:
        """Return the scores of all classes, and the activations of the layer that the archive's module names."""
        outputs, activations = getattr(self.original, WITH_ACTIVATIONS)(*explainable.arguments(*parts))
        return (explainable.class_scores or self.class_scores)(outputs), activations

    def attribute(
        self, explainable: Explainable, options: ExplanationOptions, deadline: admission.Deadline
    ) -> Explanation:
        """Attribute the score of a class to the parts of an input. Equal calls have equal results.

        Raises:
            InvalidOption: the method does not fit the model or the input, or the input has nothing of the target.
            Overloaded: the deadline has passed.
        """
        methods = self.methods(explainable)
        method = options.method or methods[0]
        if method not in methods:
            raise InvalidOption(f"method must be one of {', '.join(methods)}.")
        from handlers.core import attribution

        parts, blank, groups = (
            tuple(each.to(self.device) for each in tensors)
            for tensors in (explainable.inputs, explainable.baselines, explainable.groups)
        )
        with torch.no_grad():
            of_input, of_baseline = (self.scores(explainable, each)[0] for each in (parts, blank))
        target = self.predicted(of_input, of_baseline) if options.target is None else self.class_index(options.target)
        score, baseline_score = of_input[target].item(), of_baseline[target].item()
        if score < self.least_score:
            raise InvalidOption(f"There is nothing to explain: the model finds no {self.labels[target]} in this input.")

        def scores(*changed: Tensor) -> Tensor:
            deadline.check()  # Captum calls this for each batch of its work
            return self.scores(explainable, changed)[:, target]

        def activations(*same: Tensor) -> tuple[Tensor, Tensor]:
            of_classes, found = self.scores_and_activations(explainable, same)
            return of_classes[:, target], found

        def found(attributions: Attributions) -> Explanation:
            host = tuple(each.detach()[0].float().cpu() for each in attributions)
            return Explanation(target, method, score, baseline_score, host)

        run = attribution.Run(scores, parts, blank, groups, explainable.windows, self.run_size, activations)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            if method != "integrated_gradients":
                return found(getattr(run, method)(options.n_samples))
            for steps in [options.n_steps] if options.n_steps else explainable.steps:
                explanation = found(run.integrated_gradients(steps))
                if abs(explanation.completeness_gap) <= SMALL_GAP * abs(score - baseline_score):
                    break
            return explanation


class ExplainedClassifier(ExplainedHandler, ClassifierHandler):
    """A classifier whose answers can be explained. A subclass also defines `explainable`."""

    def class_scores(self, outputs: Outputs) -> Tensor:
        """Return the logarithms of the probabilities."""
        main = main_output(outputs).float()
        return main.log_softmax(1) if self.settings.outputs == "logits" else main.clamp_min(1e-9).log()

    def probability(self, score: float) -> float:
        return math.exp(score)

    def describe_target(self, explanation: Explanation) -> dict[str, JsonValue]:
        return {"probability": self.probability(explanation.score), **super().describe_target(explanation)}
