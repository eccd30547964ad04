"""Curves thinned to what a screen can show, so that hundreds of them still make a small page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from guilomo.report.units import number

#: Points per curve; a longer curve shows the mean of each bin.
POINTS = 60

Curve = tuple[list[float], list[float]]


def clean(steps: Sequence[Any], values: Sequence[Any]) -> Curve:
    """The pairs whose value is a finite number; a run may have recorded a value only at some steps."""
    pairs = [(number(step), number(value)) for step, value in zip(steps, values, strict=False)]
    kept = [(step, value) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def binned(curve: Curve, bins: int = POINTS) -> Curve:
    """At most `bins` points, each the mean of equally many neighbouring ones."""
    steps, values = curve
    if len(steps) <= bins:
        return curve
    edges = [round(i * len(steps) / bins) for i in range(bins + 1)]
    pairs = [slice(a, b) for a, b in pairwise(edges)]
    return [fmean(steps[part]) for part in pairs], [fmean(values[part]) for part in pairs]


def picked(curve: Curve, limit: int = POINTS) -> Curve:
    """At most `limit` points of the curve itself, always with the first and the last: for smooth curves."""
    steps, values = curve
    if len(steps) <= limit:
        return curve
    chosen = [round(i * (len(steps) - 1) / (limit - 1)) for i in range(limit)]
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def mean_curve(curves: Iterable[Sequence[Sequence[Any]]]) -> Curve:
    """The mean over seeds at every step that any of them logged, from `[[step, value], ...]` per seed."""
    at: dict[float, list[float]] = {}
    for curve in curves:
        steps, values = clean([point[0] for point in curve], [point[1] for point in curve])
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    return sorted(at), [fmean(at[step]) for step in sorted(at)]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved apart until neighbours are at least `gap` away, each staying near its own place."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(50):
        for below, above in pairwise(order):
            short = gap - (placed[above] - placed[below])
            if short > 1e-9:
                placed[below] -= short / 2
                placed[above] += short / 2
    return placed
