"""Intervals and tests against known values and against scipy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from guilomo.errors import GuilomoError
from guilomo.evaluation import (
    Score,
    bootstrap,
    bootstrap_counts,
    holm,
    mcnemar,
    paired_difference,
    paired_runs,
    t_interval,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (7, 10), (1, 500), (250, 500)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    score = wilson(hits, n)
    assert (score.value, score.n) == (hits / n, n)
    assert score.low == pytest.approx(expected.low, abs=1e-12)
    assert score.high == pytest.approx(expected.high, abs=1e-12)


def test_t_interval_equals_scipy() -> None:
    values = [0.71, 0.74, 0.69]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    score = t_interval(values)
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high))
    single = t_interval([0.5])
    assert math.isnan(single.low)
    assert json.loads(json.dumps(single.to_dict())) == {"value": 0.5, "low": None, "high": None, "n": 1}


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_seeded() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    score = bootstrap(values, seed=4)
    half = 1.96 * values.std() / 20
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half), abs=0.03)
    assert bootstrap(values, seed=4) == score
    assert bootstrap(values, seed=5) != score


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        score = bootstrap(generator.exponential(1.0, size=80), seed=trial, resamples=400)
        hits += score.low <= 1.0 <= score.high
    assert 0.86 <= hits / 200 <= 0.99


def test_counts_and_rows_give_the_same_interval() -> None:
    rows = np.array([1.0] * 60 + [0.0] * 40)
    of_rows = bootstrap(rows, resamples=5000)
    of_counts = bootstrap_counts([40, 60], lambda counts: counts[:, 1] / counts.sum(axis=1), resamples=5000)
    assert (of_rows.value, of_rows.n) == (of_counts.value, of_counts.n)
    assert (of_rows.low, of_rows.high) == pytest.approx((of_counts.low, of_counts.high), abs=0.011)


def test_mcnemar_equals_the_binomial_test() -> None:
    a = [True] * 30 + [True] * 9 + [False] * 2 + [False] * 5
    b = [True] * 30 + [False] * 9 + [True] * 2 + [False] * 5
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b, found.n) == (9, 2, 46)
    assert found.p_value == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert found.p_value == mcnemar(b, a).p_value
    assert mcnemar(a, a).p_value == 1.0


def test_paired_difference() -> None:
    generator = np.random.default_rng(3)
    base = generator.normal(2.0, 1.0, size=300)
    better = base - 0.2 + generator.normal(0, 0.5, size=300)
    found = paired_difference(better, base)
    assert found.score.value == pytest.approx((better - base).mean())
    assert found.score.high < 0
    assert found.p_value == pytest.approx(2 / 2001)
    same = paired_difference(base, base)
    assert (same.score.value, same.p_value) == (0.0, 1.0)
    reverse = paired_difference(base, better)
    assert reverse.score.low == pytest.approx(-found.score.high)


def test_paired_p_values_are_about_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(0)
    found = [
        paired_difference(generator.normal(size=60), generator.normal(size=60), seed, 400).p_value
        for seed in range(200)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11
    assert 0.4 <= np.mean(np.array(found) < 0.5) <= 0.6


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bad_input() -> None:
    with pytest.raises(GuilomoError, match="n = 0"):
        wilson(0, 0)
    with pytest.raises(GuilomoError, match="successes = 3"):
        wilson(3, 2)
    with pytest.raises(GuilomoError, match="at least 1 observation"):
        bootstrap([])
    with pytest.raises(GuilomoError, match=r"values\[1\] = nan"):
        bootstrap([1.0, math.nan])
    with pytest.raises(GuilomoError, match="resamples = 0"):
        bootstrap([1.0], resamples=0)
    with pytest.raises(GuilomoError, match="at least 1 observation"):
        bootstrap_counts([0, 0], lambda counts: counts[:, 0])
    with pytest.raises(GuilomoError, match="Pair the rows by id"):
        mcnemar([True], [True, False])
    with pytest.raises(GuilomoError, match="0 to 1"):
        holm([1.5])
    with pytest.raises(GuilomoError, match="one number per observation"):
        t_interval([[1.0, 2.0]])


def test_scores_are_plain_data() -> None:
    assert Score(np.float64(0.5), 0.1, math.inf, 3).to_dict() == {"value": 0.5, "low": 0.1, "high": None, "n": 3}


def test_paired_runs_with_one_run_is_the_paired_difference_of_rows() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.2, 1, (1, 300)), generator.normal(0, 1, (1, 300))
    runs, rows = paired_runs(a, b), paired_difference(a[0], b[0])
    assert runs.score.value == pytest.approx(rows.score.value)
    assert runs.score.low == pytest.approx(rows.score.low, abs=0.02)
    assert runs.score.high == pytest.approx(rows.score.high, abs=0.02)


def test_paired_runs_widens_with_disagreement_between_runs() -> None:
    generator = np.random.default_rng(4)
    noise = generator.normal(0, 0.1, (3, 400))
    steady = paired_runs(noise + 0.1, np.zeros((3, 400)))
    shaky = paired_runs(noise + np.array([[0.9], [-0.5], [-0.1]]), np.zeros((3, 400)))
    assert steady.score.value == pytest.approx(shaky.score.value, abs=1e-9)
    assert shaky.score.high - shaky.score.low > 5 * (steady.score.high - steady.score.low)
    assert steady.p_value < 0.01 < shaky.p_value


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize(("luck", "rows"), [(1.0, 0.0), (0.0, 4.0), (0.3, 4.0)])
def test_paired_runs_calls_nothing_something_in_one_case_of_twenty(runs: int, luck: float, rows: float) -> None:
    """Whether training or test rows bring the noise; a bootstrap over 3 runs errs in up to one of four."""
    generator = np.random.default_rng(5)
    errors = 0
    for _ in range(600):
        noise = generator.normal(0, luck, (runs, 1)) + generator.normal(0, rows, (1, 100))
        noise = noise + generator.normal(0, 0.5, (runs, 100))
        errors += paired_runs(noise, np.zeros_like(noise)).p_value < 0.05
    assert errors / 600 < 0.075
    if luck == 0.0 or rows == 0.0:
        assert errors / 600 > 0.02


def test_paired_runs_equals_the_t_test_where_all_rows_agree() -> None:
    apart = np.array([0.3, 0.5, 0.1])
    found = paired_runs(np.repeat(apart[:, None], 50, axis=1), np.zeros((3, 50)))
    expected = stats.ttest_1samp(apart, 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.score.low, found.score.high) == pytest.approx((interval.low, interval.high))
    same = paired_runs(np.ones((3, 50)), np.ones((3, 50)))
    assert (same.score.low, same.score.value, same.score.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_paired_runs_refuses_other_shapes() -> None:
    with pytest.raises(GuilomoError, match=r"runs, rows"):
        paired_runs(np.zeros((2, 3)), np.zeros((3, 2)))
