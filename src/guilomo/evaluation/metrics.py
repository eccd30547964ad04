"""Measures of quality, each as a `Score` with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..errors import invalid
from .statistics import Array, Score, bootstrap, bootstrap_counts, wilson


def accuracy(correct: Sequence[bool]) -> Score:
    """Share of rows that are right, with Wilson's interval."""
    return wilson(int(np.asarray(correct, dtype=bool).sum()), len(correct))


def confusion(labels: Sequence[int], predictions: Sequence[int], classes: int) -> Array:
    """`(C, C)` counts: rows are true classes, columns predicted ones.

    Raises:
        GuilomoError: different lengths, no rows, or a class out of range.
    """
    true, guessed = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if len(true) != len(guessed) or len(true) == 0:
        raise invalid("lengths of labels and predictions", (len(true), len(guessed)), "equal lengths above 0")
    for name, values in (("labels", true), ("predictions", guessed)):
        if values.min() < 0 or values.max() >= classes:
            raise invalid(name, sorted(set(values.tolist())), f"classes from 0 to {classes - 1}")
    return np.bincount(true * classes + guessed, minlength=classes * classes).reshape(classes, classes).astype(float)


def f1(
    labels: Sequence[int],
    predictions: Sequence[int],
    classes: int,
    average: Literal["macro", "binary"] = "macro",
    seed: int = 0,
) -> Score:
    """F1, as the mean over the classes that occur ("macro") or of class 1 alone ("binary", two classes).

    A class that is neither true nor predicted anywhere has no F1 and is left out of the mean; if class 1 is such a
    class, the binary F1 is 0.

    Raises:
        GuilomoError: "binary" with more than two classes; or what `confusion` refuses.
    """
    if average not in ("macro", "binary"):
        raise invalid("average", average, "'macro' or 'binary'")
    if average == "binary" and classes != 2:
        raise invalid("average", average, f"'macro' for {classes} classes", "Binary F1 needs exactly 2 classes.")
    table = confusion(labels, predictions, classes)
    return bootstrap_counts(table, _macro_f1 if average == "macro" else _binary_f1, seed)


def matthews(labels: Sequence[int], predictions: Sequence[int], classes: int, seed: int = 0) -> Score:
    """Matthews' correlation (for any number of classes), 0 where only one class is true or predicted."""
    return bootstrap_counts(confusion(labels, predictions, classes), _matthews, seed)


def mean_loss(loss_sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> Score:
    """Loss per prediction in nats: all rows' losses over all rows' predictions; rows are resampled.

    Where a loss is infinite or NaN (a model that diverged), so is the score, without an interval.

    Raises:
        GuilomoError: a row without predictions, no rows, or different lengths.
    """
    rows = _stacked(loss_sums, counts)
    if not np.isfinite(rows).all():
        return Score(float(_ratio(rows[None])[0]), math.nan, math.nan, len(rows))
    return bootstrap(rows, _ratio, seed)


def perplexity(loss_sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> Score:
    """`exp` of the loss per token, over all tokens (not the mean of the rows' perplexities); rows are resampled.

    Where a loss is infinite or NaN (a model that diverged), so is the score, without an interval.

    Raises:
        GuilomoError: a row without predictions, no rows, or different lengths.
    """
    # The exponential is monotone, so it carries the interval of the loss over. Above about 709 nats it leaves the range
    # of float64; infinity is then the honest answer.
    loss = mean_loss(loss_sums, counts, seed)
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(number)) for number in (loss.value, loss.low, loss.high))
    return Score(value, low, high, loss.n)


def _stacked(loss_sums: ArrayLike, counts: ArrayLike) -> Array:
    sums, numbers = np.asarray(loss_sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if sums.shape != numbers.shape or sums.ndim != 1:
        raise invalid("shapes of loss_sums and counts", (sums.shape, numbers.shape), "two equal vectors")
    if (numbers < 1).any():
        raise invalid("counts", float(numbers.min()), "at least 1 prediction in every row", "Leave empty rows out.")
    return np.stack([sums, numbers], axis=1)


def _ratio(samples: Array) -> Array:
    totals = samples.sum(axis=1)
    return np.asarray(totals[:, 0] / totals[:, 1])


def _class_f1(tables: Array) -> Array:
    """F1 of each class, `(S, C, C)` -> `(S, C)`; NaN where a class neither occurs nor is predicted."""
    hits = np.diagonal(tables, axis1=1, axis2=2)
    size = tables.sum(axis=1) + tables.sum(axis=2)
    return np.asarray(np.divide(2 * hits, size, out=np.full_like(size, np.nan), where=size > 0))


def _macro_f1(tables: Array) -> Array:
    return np.asarray(np.nanmean(_class_f1(tables), axis=1))


def _binary_f1(tables: Array) -> Array:
    return np.nan_to_num(_class_f1(tables)[:, 1], nan=0.0)


def _matthews(tables: Array) -> Array:
    true, guessed = tables.sum(axis=2), tables.sum(axis=1)
    total = tables.sum(axis=(1, 2))
    hits = np.trace(tables, axis1=1, axis2=2)
    above = hits * total - (true * guessed).sum(axis=1)
    below = np.sqrt((total**2 - (guessed**2).sum(axis=1)) * (total**2 - (true**2).sum(axis=1)))
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0))
