"""Which rank each expert gets: all wishes times one factor, so that the budget is met."""

from __future__ import annotations

import math
from collections.abc import Sequence

from guilomo.allocation.rounding import remainder_order, spread_order

HALVINGS = 80


def ranks_within(wishes: Sequence[float], units: Sequence[int], room: int, cap: int) -> list[int]:
    """Integer ranks in [1, cap] in proportion to `wishes`, costing at most `room` parameters.

    The factor for which the real-valued ranks cost exactly `room` is found by bisection; the ranks are rounded
    down, and what is left is given out one row at a time: by largest remainder first, then to whatever still
    fits. In the end no row below the cap fits any more. Source: ours.

    Args:
        wishes: wished rank of every expert of every module, all above 0.
        units: parameters of one rank row (I+O) of the module each belongs to.
        room: at least sum(units).
        cap: highest rank allowed.
    """
    factor = _factor(wishes, units, room, cap)
    wanted = [min(max(factor * wish, 1.0), float(cap)) for wish in wishes]
    ranks = [math.floor(rank) for rank in wanted]
    left = room - sum(rank * unit for rank, unit in zip(ranks, units, strict=True))
    left = _add_rows(ranks, units, left, cap, remainder_order(wanted))
    before = left + 1
    while left < before:
        before = left
        left = _add_rows(ranks, units, left, cap, spread_order(len(ranks)))
    return ranks


def _factor(wishes: Sequence[float], units: Sequence[int], room: int, cap: int) -> float:
    """The largest factor at which the real-valued ranks cost no more than `room`; any large one if none does."""

    def overruns(factor: float) -> bool:
        costs = (min(max(factor * wish, 1.0), cap) * unit for wish, unit in zip(wishes, units, strict=True))
        return math.fsum(costs) > room

    low, high = 0.0, 1.0
    while not overruns(high):
        if high * min(wishes) >= cap:
            return high
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if overruns(middle) else (middle, high)
    return low


def _add_rows(ranks: list[int], units: Sequence[int], left: int, cap: int, order: Sequence[int]) -> int:
    """One more rank row, in `order`, to each expert below the cap where it fits; returns what is left."""
    for index in order:
        if ranks[index] < cap and units[index] <= left:
            ranks[index] += 1
            left -= units[index]
    return left
