"""How many experts each module gets: the wish, moved only as far as a budget forces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guilomo.allocation.candidate import Candidate
from guilomo.allocation.costs import RouterCost
from guilomo.allocation.rounding import half_up, spread_order
from guilomo.errors import invalid

HALVINGS = 60
UNREACHED = 0
"""A rank cap of 0: no count ever reaches the budget, so raising goes on as long as anything fits."""

Counts = list[int]


def rounded_counts(modules: Sequence[Candidate], factor: float = 1.0) -> Counts:
    """E of each module: `factor` times its wish, rounded and kept between its bounds."""
    return [min(max(half_up(factor * module.wish), module.low), module.high) for module in modules]


def counts_within(modules: Sequence[Candidate], budget: int, rank_cap: int, router: RouterCost) -> Counts:
    """Expert counts for which ranks between 1 and `rank_cap` can meet the budget.

    The rounded wishes, if they can. If even rank 1 everywhere overruns, all wishes shrink by one factor (never
    below a module's lower bound); if `rank_cap` everywhere leaves budget over, they grow by one factor (never
    above the upper bound, where the budget may remain unmet). Source: ours.

    Raises:
        GuilomoError: the lower bounds at rank 1 already overrun; names the smallest budget that works.
    """

    def cost(counts: Counts, rank: int) -> int:
        return sum(module.cost(count, rank, router) for module, count in zip(modules, counts, strict=True))

    counts = rounded_counts(modules)
    if cost(counts, 1) > budget:
        smallest = cost([module.low for module in modules], 1)
        if smallest > budget:
            remedy = "Raise the budget, adapt fewer modules, or lower top_k."
            raise invalid("budget", budget, f"at least {smallest} (fewest experts, each of rank 1)", remedy)
        below, above = _bracket(modules, 0.0, 1.0, lambda tried: cost(tried, 1) <= budget)
        return _raised(modules, below, above, budget, UNREACHED, router)
    if cost(counts, rank_cap) >= budget:
        return counts
    return _grown(modules, budget, rank_cap, router, lambda tried: cost(tried, rank_cap) < budget)


def _grown(
    modules: Sequence[Candidate],
    budget: int,
    rank_cap: int,
    router: RouterCost,
    too_few: Callable[[Counts], bool],
) -> Counts:
    """The smallest growth of the wishes whose full-rank cost reaches the budget, or the upper bounds."""
    factor = 1.0
    highest = [module.high for module in modules]
    while too_few(rounded_counts(modules, factor)):
        if rounded_counts(modules, factor) == highest:
            return highest
        factor *= 2
    below, above = _bracket(modules, factor / 2, factor, too_few)
    counts = _raised(modules, below, above, budget, rank_cap, router)
    return _raised(modules, counts, highest, budget, rank_cap, router)


def _bracket(
    modules: Sequence[Candidate], low: float, high: float, holds: Callable[[Counts], bool]
) -> tuple[Counts, Counts]:
    """Counts just below and just above the factor at which `holds` turns false, by bisection."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(rounded_counts(modules, middle)) else (low, middle)
    return rounded_counts(modules, low), rounded_counts(modules, high)


def _raised(
    modules: Sequence[Candidate],
    counts: Counts,
    limits: Counts,
    budget: int,
    rank_cap: int,
    router: RouterCost,
) -> Counts:
    """Adds experts one at a time, spread over the modules, up to `limits`.

    Stops when ranks of `rank_cap` would use up the budget; skips what would overrun it even at rank 1.
    """
    counts = list(counts)
    room = budget - sum(module.cost(count, 1, router) for module, count in zip(modules, counts, strict=True))
    short = budget - sum(module.cost(count, rank_cap, router) for module, count in zip(modules, counts, strict=True))
    progress = True
    while progress and short > 0:
        progress = False
        for index in spread_order(len(modules)):
            module, count = modules[index], counts[index]
            step = module.cost(count + 1, 1, router) - module.cost(count, 1, router)
            if short > 0 and count < limits[index] and step <= room:
                counts[index], room, progress = count + 1, room - step, True
                short -= module.cost(count + 1, rank_cap, router) - module.cost(count, rank_cap, router)
    return counts
