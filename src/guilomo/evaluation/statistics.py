"""Numbers with their uncertainty: every estimate is a `Score`, with a 95 % interval and the number it rests on.

Resampling is seeded, so equal inputs give equal intervals. Nothing here knows about models or tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import invalid

Array = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2000
CELLS = 4_000_000  # resampled values held in memory at once


@dataclass(frozen=True)
class Score:
    """An estimate with its 95 % interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; NaN where one observation gives none.
        n: observations it rests on (rows, or seeds).
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which knows no NaN: such numbers become None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        kept = {name: float(number) if math.isfinite(number) else None for name, number in numbers.items()}
        return {**kept, "n": int(self.n)}


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two classifiers on the same rows.

    Attributes:
        only_a, only_b: rows that only a, or only b, has right.
        p_value: two-sided, from the binomial distribution of the rows on which they differ.
        n: rows compared.
    """

    only_a: int
    only_b: int
    p_value: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over paired rows, its interval, and a two-sided bootstrap p-value."""

    score: Score
    p_value: float


def wilson(successes: int, n: int) -> Score:
    """A proportion with Wilson's interval, which stays inside [0, 1] and is sound for small n.

    Raises:
        GuilomoError: n is below 1, or successes is not between 0 and n.
    """
    if n < 1:
        raise invalid("n", n, "at least 1 observation")
    if not 0 <= successes <= n:
        raise invalid("successes", successes, f"a number from 0 to n = {n}")
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula gives 0 and 1 only up to rounding.
    low = 0.0 if successes == 0 else float(centre - half)
    return Score(share, low, 1.0 if successes == n else float(centre + half), n)


def t_interval(values: ArrayLike) -> Score:
    """Mean over independent runs (seeds) with Student's interval; one run has no interval.

    Raises:
        GuilomoError: there are no values, or some are not finite.
    """
    numbers = _vector(values, "values")
    mean, n = float(numbers.mean()), len(numbers)
    if n == 1:
        return Score(mean, math.nan, math.nan, 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n)
    return Score(mean, float(mean - half), float(mean + half), n)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Array], Array] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Score:
    """A statistic of rows with its percentile bootstrap interval.

    Args:
        values: `(N,)` or `(N, k)`, one row per observation.
        statistic: maps `(S, N)` or `(S, N, k)` samples to `(S,)` values; the mean if left out (only for `(N,)`).
        seed: seed of the resampling.
        resamples: number of resamples.

    Raises:
        GuilomoError: there are no values, some are not finite, or resamples is below 1.
    """
    rows = _finite(values, "values")
    compute = statistic if statistic is not None else _mean
    drawn = _resampled(rows, compute, seed, resamples)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(float(compute(rows[None])[0]), float(low), float(high), len(rows))


def bootstrap_counts(
    counts: ArrayLike, statistic: Callable[[Array], Array], seed: int = 0, resamples: int = RESAMPLES
) -> Score:
    """Like `bootstrap`, for statistics that depend only on how often each of few cells occurs.

    Drawing N rows with replacement makes the cell counts multinomial, so the rows themselves need not be drawn.

    Args:
        counts: non-negative whole numbers of any shape, for example a `(C, C)` confusion matrix; N is their sum.
        statistic: maps `(S, *shape)` counts to `(S,)` values.
        seed: seed of the resampling.
        resamples: number of resamples.

    Raises:
        GuilomoError: the counts sum to 0, or resamples is below 1.
    """
    table = np.asarray(counts, dtype=np.int64)
    total = int(table.sum())
    if total < 1:
        raise invalid("counts", table.tolist(), "at least 1 observation")
    _check_resamples(resamples)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(total, table.ravel() / total, size=resamples).reshape(resamples, *table.shape)
    low, high = np.quantile(statistic(drawn.astype(np.float64)), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(float(statistic(table[None].astype(np.float64))[0]), float(low), float(high), total)


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> McNemar:
    """Do two classifiers differ in accuracy on the same rows? Exact two-sided test.

    Raises:
        GuilomoError: the two have different lengths or are empty.
    """
    a, b = _paired(correct_a, correct_b)
    only_a, only_b = int(((a > 0) & (b == 0)).sum()), int(((a == 0) & (b > 0)).sum())
    if only_a + only_b == 0:
        return McNemar(0, 0, 1.0, len(a))
    p_value = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
    return McNemar(only_a, only_b, p_value, len(a))


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Mean difference a - b per row (loss, or correctness as 0/1) with a paired bootstrap.

    The p-value is twice the smaller share of resampled means on either side of 0, one resample being added on each side
    so that it is never 0; its smallest value is 2 / (resamples + 1).

    Raises:
        GuilomoError: the two have different lengths, are empty, or are not finite.
    """
    first, second = _paired(a, b)
    rows = first - second
    return _difference(float(rows.mean()), _resampled(rows, _mean, seed, resamples), len(rows))


def paired_runs(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Mean difference a - b over several runs of two methods on the same rows, runs paired by their seed.

    Runs and rows are both a sample: other seeds and other test rows would have given other numbers. Their two mean
    squares add up to the variance of the mean, and Student's t, with the degrees of freedom of Satterthwaite (1946),
    allows for there being few runs. This is the min F' of Clark (1973) with one degree of freedom. It does not credit
    what both mean squares share, so that it errs on the side of seeing nothing; only with two runs does it still see
    something in one case of eleven where there is nothing. With one run it is `paired_difference`, which knows nothing
    of the luck of training.

    Args:
        a, b: `(S, N)` values of S runs on N rows.
        seed, resamples: of the bootstrap over rows with one run.

    Raises:
        GuilomoError: the two have different shapes, are empty, or are not finite.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if first.shape != second.shape or first.ndim != 2:
        raise invalid("a and b", (first.shape, second.shape), "two arrays (runs, rows) of one shape")
    if len(first) == 1:
        return paired_difference(first[0], second[0], seed, resamples)
    apart = first - second
    parts = [_share_of_variance(apart.mean(axis=1)), _share_of_variance(apart.mean(axis=0))]
    variance = sum(share for share, _ in parts)
    centre = float(apart.mean())
    if variance == 0.0:
        return Difference(Score(centre, centre, centre, apart.size), 1.0 if centre == 0.0 else 0.0)
    freedom = variance**2 / sum(share**2 / df for share, df in parts if df)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(centre) / error, freedom))
    return Difference(Score(centre, centre - half, centre + half, apart.size), p_value)


def _share_of_variance(means: Array) -> tuple[float, int]:
    """What one factor adds to the variance of the overall mean, and its degrees of freedom; (0, 0) with one level."""
    if len(means) == 1:
        return 0.0, 0
    return float(means.var(ddof=1)) / len(means), len(means) - 1


def _difference(mean: float, drawn: Array, n: int) -> Difference:
    """A difference from its resampled means; one resample is added on each side, so that p is never 0."""
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    p_value = min(1.0, 2 * (1 + min(below, above)) / (len(drawn) + 1))
    return Difference(Score(mean, float(low), float(high), n), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: reject where they are below the wanted family-wise level.

    Raises:
        GuilomoError: a value is not between 0 and 1.
    """
    numbers = np.asarray(p_values, dtype=np.float64)
    if numbers.size and not ((numbers >= 0) & (numbers <= 1)).all():
        raise invalid("p_values", list(p_values), "numbers from 0 to 1")
    order = np.argsort(numbers, kind="stable")
    factors = np.arange(len(numbers), 0, -1)
    adjusted = np.empty_like(numbers)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(numbers[order] * factors))
    return [float(value) for value in adjusted]


def _mean(samples: Array) -> Array:
    return np.asarray(samples.mean(axis=1), dtype=np.float64)


def _resampled(rows: Array, statistic: Callable[[Array], Array], seed: int, resamples: int) -> Array:
    _check_resamples(resamples)
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // rows.size)
    parts = []
    for start in range(0, resamples, step):
        picks = generator.integers(0, len(rows), size=(min(step, resamples - start), len(rows)))
        parts.append(statistic(rows[picks]))
    return np.concatenate(parts)


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise invalid("resamples", resamples, "a number of at least 1")


def _finite(values: ArrayLike, name: str) -> Array:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim == 0 or len(numbers) == 0:
        raise invalid(name, numbers.tolist(), "at least 1 observation")
    if not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers).reshape(len(numbers), -1).all(axis=1))[0])
        remedy = "A diverged or empty row must be dealt with before averaging."
        raise invalid(f"{name}[{bad}]", numbers[bad].tolist(), "finite numbers", remedy)
    return numbers


def _vector(values: ArrayLike, name: str) -> Array:
    numbers = _finite(values, name)
    if numbers.ndim != 1:
        raise invalid(f"shape of {name}", numbers.shape, "one number per observation")
    return numbers


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    first, second = _vector(a, "a"), _vector(b, "b")
    if len(first) != len(second):
        remedy = "Pair the rows by id: both must be scored on the same split."
        raise invalid("lengths", (len(first), len(second)), "equally many rows on both sides", remedy)
    return first, second
