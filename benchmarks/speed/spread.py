"""The median of paired ratios, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

COVERAGE = 0.95


def ratio(timing: Mapping[str, Any], name: str, reference: str) -> dict[str, float]:
    """How long `name` takes in units of `reference`, from the samples of a timing.

    Both were timed in every round, so that what slows a whole round falls out of its ratio.
    """
    samples = timing["samples"]
    return middle([a / b for a, b in zip(samples[name], samples[reference], strict=True)])


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, and an interval for it from order statistics, which assumes nothing about the shape of the noise."""
    ordered = sorted(values)
    drop = dropped(len(ordered))
    return {"median": median(ordered), "low": ordered[drop], "high": ordered[len(ordered) - 1 - drop]}


def dropped(n: int) -> int:
    """How many of `n` sorted values lie outside the interval on each side.

    The true median lies outside by chance when all but `i` values fall on one of its sides, so the chance of being
    outside is a binomial tail. Below 6 values even the whole range does not reach 95 %; then it is the whole range.
    """
    outside, drop = 0.0, -1
    while drop + 1 < (n + 1) // 2:
        outside += 2 * math.comb(n, drop + 1) / 2**n
        if outside > 1 - COVERAGE:
            break
        drop += 1
    return max(drop, 0)
