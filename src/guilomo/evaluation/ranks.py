"""Several methods on several blocks: ranks, the Friedman test, and how far apart mean ranks must be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..errors import invalid
from .statistics import CONFIDENCE, Array, Score


@dataclass(frozen=True)
class Friedman:
    """Whether methods differ in their ranks over blocks.

    Attributes:
        statistic, p_value: of Friedman's chi-squared test (1937), corrected for ties.
        critical_difference: two methods differ at level 0.05 where their mean ranks are further apart than this
            (Nemenyi 1963, as in Demsar 2006, which corrects for comparing all pairs).
        mean_ranks: of the methods, 1 being the best.
        blocks: how many there are.
    """

    statistic: float
    p_value: float
    critical_difference: float
    mean_ranks: list[float]
    blocks: int


def ranks(values: ArrayLike, higher_is_better: bool) -> list[float]:
    """Ranks of values, 1 for the best; equal values share the mean of their ranks."""
    numbers = np.asarray(values, dtype=np.float64)
    return [float(rank) for rank in stats.rankdata(-numbers if higher_is_better else numbers)]


def friedman(block_ranks: ArrayLike) -> Friedman:
    """Friedman's test and Nemenyi's critical difference.

    Args:
        block_ranks: `(blocks, methods)`, the ranks within each block, see `ranks`.

    Raises:
        GuilomoError: fewer than 2 blocks or 3 methods.
    """
    table = np.asarray(block_ranks, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 3:
        raise invalid("shape of the ranks", table.shape, "at least 2 blocks and 3 methods")
    blocks, methods = table.shape
    if np.ptp(table, axis=1).max() == 0:
        # Where every block is one tie the statistic is 0 / 0; nothing could look more alike.
        statistic, p_value = 0.0, 1.0
    else:
        found = stats.friedmanchisquare(*table.T)
        statistic, p_value = float(found.statistic), float(found.pvalue)
    spread = float(stats.studentized_range.ppf(CONFIDENCE, methods, np.inf)) / math.sqrt(2)
    difference = spread * math.sqrt(methods * (methods + 1) / (6 * blocks))
    return Friedman(statistic, p_value, difference, [float(m) for m in table.mean(axis=0)], blocks)


def above_share(successes: int, n: int, share: float) -> float:
    """One-sided p-value of the exact binomial test: were so many of n right by a chance of `share` each?

    Raises:
        GuilomoError: the numbers do not fit together.
    """
    if not 0 <= successes <= n or n < 1:
        raise invalid("successes", successes, f"a number from 0 to n = {n}, and n at least 1")
    if not 0 <= share <= 1:
        raise invalid("share", share, "a number from 0 to 1")
    return float(stats.binomtest(successes, n, share, alternative="greater").pvalue)


def median_interval(values: ArrayLike) -> Score:
    """Median, with the interval between two order statistics, which assumes nothing about the shape of the noise.

    The number of values below the true median is binomial. With fewer than 6 values even the whole range does not
    reach 95 %; it is given then.

    Raises:
        GuilomoError: there are no values.
    """
    ordered: Array = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n < 1:
        raise invalid("values", ordered.tolist(), "at least 1 observation")
    drop = max(int(stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)) - 1, 0)
    return Score(float(np.median(ordered)), float(ordered[drop]), float(ordered[n - 1 - drop]), n)
