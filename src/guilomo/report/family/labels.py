"""Names beside marks: short enough for their place, and far enough from each other."""

from __future__ import annotations

from collections.abc import Sequence

from guilomo.report.reading import Method, label_of

#: Width of a letter in units of its size; the faces of the page are a little narrower.
_LETTER = 0.56


def fitted(method: Method, room: float, pixels: float) -> str:
    """The label of a method if it fits `room` pixels, else its name, which is unique, cut if it must be."""
    letters = max(int(room / (_LETTER * pixels)), 2)
    label, name = label_of(method), str(method.get("name") or "")
    if len(label) <= letters:
        return label
    return cut(name or label, letters)


def cut(text: str, letters: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def separated(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights moved as little as possible so that neighbours are `gap` apart and all lie in [low, high].

    Order is kept; equal heights keep the order they came in. Least squares: after subtracting the gaps the heights must
    not decrease, which is isotonic regression, solved by pooling adjacent violators; clipping its solution is the
    solution within bounds. Where the gaps do not fit, `high` gives way.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    pools: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        mean, size = heights[index] - place * gap, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, size = (before * many + mean * size) / (many + size), many + size
        pools.append((mean, size))
    level = [mean for mean, size in pools for _ in range(size)]
    top = max(high - (len(heights) - 1) * gap, low)
    placed = [0.0] * len(heights)
    for place, index in enumerate(order):
        placed[index] = min(max(level[place], low), top) + place * gap
    return placed
