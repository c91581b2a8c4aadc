"""Ranking of outputs, compared with numpy."""

import json
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handlers.core.topk import best_classes, rank

LABELS = [f"class {index}" for index in range(1000)]

LOGITS = arrays.arrays(
    numpy.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 20)),
    elements=st.floats(-30, 30, width=32),
    unique=True,
)


@given(LOGITS, st.data())
def test_ranking_matches_numpy(logits: numpy.ndarray, data: st.DataObject):
    k = data.draw(st.integers(1, logits.shape[1]))
    exponents = numpy.exp(logits.astype(numpy.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    for row, expected in zip(rank(torch.from_numpy(logits), "logits"), probabilities, strict=True):
        answer = best_classes(row, k, LABELS)
        best = numpy.sort(expected)[::-1][:k]
        numpy.testing.assert_allclose([entry["probability"] for entry in answer], best, rtol=1e-4, atol=1e-30)
        classes = [entry["class"] for entry in answer]
        assert len(set(classes)) == k
        numpy.testing.assert_allclose(expected[classes], best, rtol=1e-4, atol=1e-30)
        assert [entry["label"] for entry in answer] == [LABELS[index] for index in classes]
        json.dumps(answer, allow_nan=False)


@given(LOGITS)
def test_rank_returns_every_class_and_probabilities_sum_to_one(logits: numpy.ndarray):
    ranked = rank(torch.from_numpy(logits), "logits")
    assert ranked[:, 0].sum(dim=1).tolist() == pytest.approx([1] * len(logits), abs=1e-5)
    assert ranked[:, 1].sort(dim=1).values.tolist() == [list(range(logits.shape[1]))] * len(logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_another_dtype_are_ranked_in_float32(dtype: torch.dtype):
    logits = torch.linspace(-8, 8, 1000).to(dtype)[None]
    ranked = rank(logits, "logits")
    assert ranked.dtype == torch.float32
    assert torch.equal(ranked, rank(logits.float(), "logits"))


def test_probabilities_are_ranked_unchanged():
    probabilities = torch.tensor([[0.1, 0.7, 0.2]])
    assert best_classes(rank(probabilities, "probabilities")[0], 2, ["a", "b", "c"]) == [
        {"label": "b", "class": 1, "probability": pytest.approx(0.7)},
        {"label": "c", "class": 2, "probability": pytest.approx(0.2)},
    ]


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_output_affects_only_its_own_row(value: float, outputs: str):
    spoilt, sound = rank(torch.tensor([[0.0, value, 0.2], [0.0, 1.0, 0.2]]), outputs)
    assert not math.isfinite(best_classes(spoilt, 1, LABELS)[0]["probability"])
    assert best_classes(sound, 1, LABELS)[0]["class"] == 1


def test_minus_infinity_has_probability_zero():
    assert best_classes(rank(torch.tensor([[0.0, -math.inf]]), "logits")[0], 2, LABELS)[1]["probability"] == 0


def test_equal_scores_are_ranked_by_class():
    """The other rows of the batch make no difference."""
    outputs = torch.tensor([[0.0] * 20, [1.0, 0.0] * 10])
    assert rank(outputs, "logits")[:, 1].tolist() == [[*range(20)], [*range(0, 20, 2), *range(1, 20, 2)]]
