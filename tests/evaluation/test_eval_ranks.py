"""Ranks, the Friedman test, the critical difference, chance and medians, against SciPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from guilomo.errors import GuilomoError
from guilomo.evaluation.memory import peak_bytes
from guilomo.evaluation.ranks import above_share, friedman, median_interval, ranks

BLOCKS = [[1, 2, 3, 4], [1, 3, 2, 4], [2, 1, 3, 4], [1, 2, 4, 3], [1, 2, 3, 4]]


def test_ranks_begin_at_the_best_and_share_ties() -> None:
    assert ranks([0.5, 0.9, 0.5], higher_is_better=True) == [2.5, 1.0, 2.5]
    assert ranks([0.5, 0.9, 0.1], higher_is_better=False) == [2.0, 3.0, 1.0]


def test_friedman_by_hand() -> None:
    found = friedman(BLOCKS)
    sums = np.sum(BLOCKS, axis=0)
    n, k = 5, 4
    statistic = 12 / (n * k * (k + 1)) * np.sum(sums**2) - 3 * n * (k + 1)
    assert found.statistic == pytest.approx(statistic)
    assert found.p_value == pytest.approx(stats.chi2.sf(statistic, k - 1))
    assert found.mean_ranks == [1.2, 2.0, 3.0, 3.8]
    assert found.blocks == 5


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_has_the_published_constants(methods: int, q: float) -> None:
    """The table of critical values of Nemenyi's test at 0.05 that Demsar (2006) prints."""
    block = [float(rank) for rank in range(1, methods + 1)]
    found = friedman([block] * 14)
    assert found.critical_difference == pytest.approx(q * math.sqrt(methods * (methods + 1) / (6 * 14)), abs=2e-3)


def test_ties_everywhere_are_no_difference() -> None:
    found = friedman([[2.0, 2.0, 2.0]] * 4)
    assert (found.statistic, found.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("table", [[[1, 2, 3]], [[1, 2], [2, 1]], [1, 2, 3]])
def test_too_little_for_friedman_is_refused(table: list[object]) -> None:
    with pytest.raises(GuilomoError, match="at least 2 blocks and 3 methods"):
        friedman(table)  # type: ignore[arg-type]


def test_above_a_share_is_the_binomial_tail() -> None:
    tail = sum(math.comb(10, k) * 0.3**k * 0.7 ** (10 - k) for k in range(6, 11))
    assert above_share(6, 10, 0.3) == pytest.approx(tail)
    assert above_share(0, 10, 0.3) == 1.0
    with pytest.raises(GuilomoError, match="successes"):
        above_share(11, 10, 0.3)
    with pytest.raises(GuilomoError, match="share"):
        above_share(1, 10, 1.3)


def test_an_interval_of_the_median_covers_it() -> None:
    generator = np.random.default_rng(0)
    for n in (6, 9, 20):
        found = [median_interval(generator.lognormal(size=n)) for _ in range(2000)]
        share = np.mean([score.low <= 1.0 <= score.high for score in found])
        assert 0.94 < share < 0.99
    assert median_interval([3.0]).low == 3.0
    values = list(range(1, 10))
    assert (median_interval(values).low, median_interval(values).value, median_interval(values).high) == (2, 5, 8)
    with pytest.raises(GuilomoError, match="values"):
        median_interval([])


def test_peak_bytes_are_counted() -> None:
    def work() -> None:
        a = torch.zeros(100)
        b = a + 1
        del a
        c = b.view(10, 10) + 1  # a view is no new storage
        del b, c

    assert peak_bytes(work) == 800
