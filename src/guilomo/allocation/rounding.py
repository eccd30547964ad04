"""From real numbers to integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

GOLDEN = (math.sqrt(5) - 1) / 2


def half_up(value: float) -> int:
    """The nearest integer, halves upwards (Python's own round sends 2.5 to 2 and 3.5 to 4)."""
    return math.floor(value + 0.5)


def spread_order(count: int) -> list[int]:
    """The indices 0..count-1 so ordered that every beginning of the list is spread evenly over the range.

    Sorted by the fractional part of i * 0.618..., a low-discrepancy sequence. Used to break ties, which otherwise
    would all be won by the first layers. Source: ours.
    """
    return sorted(range(count), key=lambda index: index * GOLDEN % 1.0)


def remainder_order(values: Sequence[float]) -> list[int]:
    """Indices by falling fractional part, ties in spread order.

    Fractions are compared to 9 digits, so that rounding errors do not decide between equal wishes.
    """
    return sorted(spread_order(len(values)), key=lambda index: -round(values[index] % 1.0, 9))


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to `weights` whose sum is exactly `total` (largest-remainder or Hamilton method)."""
    unit = total / math.fsum(weights)
    shares = [weight * unit for weight in weights]
    counts = [math.floor(share) for share in shares]
    for index in remainder_order(shares)[: total - sum(counts)]:
        counts[index] += 1
    return counts
