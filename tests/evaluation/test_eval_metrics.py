"""Metrics against hand computations and, where it is installed, scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from guilomo.errors import GuilomoError
from guilomo.evaluation import metrics


def test_accuracy() -> None:
    score = metrics.accuracy([True, False, True, True])
    assert (score.value, score.n) == (0.75, 4)
    assert 0 < score.low < 0.75 < score.high < 1


def test_binary_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    labels = [1] * 5 + [0] * 5
    guesses = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    score = metrics.f1(labels, guesses, 2, "binary")
    assert score.value == pytest.approx(6 / 9)
    assert score.low < score.value < score.high
    assert metrics.matthews(labels, guesses, 2).value == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert metrics.f1(labels, guesses, 2).value == pytest.approx((6 / 9 + 8 / 11) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn(seed: int) -> None:
    reference: Any = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    classes = 2 + seed
    labels, guesses = generator.integers(0, classes, size=(2, 60)).tolist()
    assert metrics.f1(labels, guesses, classes).value == pytest.approx(
        reference.f1_score(labels, guesses, average="macro")
    )
    assert metrics.matthews(labels, guesses, classes).value == pytest.approx(
        reference.matthews_corrcoef(labels, guesses)
    )


def test_degenerate_classes() -> None:
    assert metrics.matthews([0, 1, 1], [1, 1, 1], 2).value == 0.0
    assert metrics.f1([0, 0], [0, 0], 2, "binary").value == 0.0
    assert metrics.f1([0, 0], [0, 0], 5).value == 1.0


def test_perplexity_by_hand() -> None:
    score = metrics.perplexity([2.0, 6.0, 1.0], [2, 3, 4])
    assert score.value == pytest.approx(math.exp(9 / 9))
    assert metrics.mean_loss([2.0, 6.0, 1.0], [2, 3, 4]).value == pytest.approx(1.0)
    assert score.low <= score.value <= score.high
    assert score.high <= math.exp(2.0) + 1e-9
    assert score.n == 3


def test_a_diverged_model_has_a_score_without_an_interval() -> None:
    for bad in (math.nan, math.inf):
        score = metrics.mean_loss([1.0, bad], [1, 1])
        assert not math.isfinite(score.value)
        assert math.isnan(score.low)
    assert metrics.perplexity([1e6], [1]).value == math.inf


def test_bad_input() -> None:
    with pytest.raises(GuilomoError, match="classes from 0 to 1"):
        metrics.f1([0, 2], [0, 1], 2)
    with pytest.raises(GuilomoError, match="equal lengths above 0"):
        metrics.matthews([0], [0, 1], 2)
    with pytest.raises(GuilomoError, match="exactly 2 classes"):
        metrics.f1([0], [0], 3, "binary")
    with pytest.raises(GuilomoError, match="'macro' or 'binary'"):
        metrics.f1([0], [0], 2, "micro")  # type: ignore[arg-type]
    with pytest.raises(GuilomoError, match="at least 1 prediction"):
        metrics.perplexity([1.0], [0])
    with pytest.raises(GuilomoError, match="two equal vectors"):
        metrics.perplexity([1.0], [1, 2])
