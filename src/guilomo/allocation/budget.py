"""Turns a preference into an integer plan that never overruns its budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guilomo.allocation.candidate import Candidate, Limits, candidates, check_limits
from guilomo.allocation.costs import RouterCost, linear_router, shared_parameters
from guilomo.allocation.counts import counts_within, rounded_counts
from guilomo.allocation.modules import ModulePlan, plan_module, positive_int
from guilomo.allocation.plan import Allocation
from guilomo.allocation.preference import Preference
from guilomo.allocation.ranks import ranks_within
from guilomo.allocation.rounding import half_up
from guilomo.errors import GuilomoError, invalid

TOLERANCE = 0.01
"""How much of a budget a plan may leave unused before a cap that causes it is an error."""


def same_budget(plan: Allocation, router: RouterCost = linear_router) -> int:
    """The trainable parameters of `plan`, as a budget for another one."""
    return plan.parameters(router)


def fit(
    preference: Preference,
    shapes: Mapping[str, tuple[int, int]],
    *,
    top_k: int | Mapping[str, int] = 2,
    budget: int | Allocation | None = None,
    max_experts: int | None = None,
    max_rank: int | None = None,
    router: RouterCost = linear_router,
    alpha: float = 16.0,
    scaling: str = "alpha_over_r",
    strategy: str = "fit",
    top_k_floor: bool = True,
) -> Allocation:
    """The integer plan nearest to a preference, under a budget of trainable parameters. Source: ours.

    Without a budget every wish is rounded to the nearest integer. With one, expert counts stay as wished and ranks
    are scaled by one factor; counts move only if no ranks can meet the budget. The result never costs more than
    the budget. It falls short by less than one rank row (I+O) of any module below the caps, so it uses above 99%
    where such a row costs less than 1%.

    Args:
        preference: wished experts and ranks for exactly the modules of `shapes`.
        shapes: module -> (I, O).
        top_k: K, for all modules or per module.
        budget: parameters including routers, or a plan that uses as many as this one may.
        max_experts: highest E of a module.
        max_rank: highest rank of an expert.
        router: parameters of a router.
        alpha, scaling, strategy: passed on to the Allocation.
        top_k_floor: E is at least K. If False, a module may have fewer and then uses all of them.

    Raises:
        GuilomoError: the budget is too small (names the smallest that works) or cannot be used up under the caps
            (names the caps to raise), or an argument cannot be used.
    """
    limits = Limits(top_k, top_k_floor, max_experts, max_rank)
    check_limits(limits)
    modules = candidates(preference, shapes, limits)
    if budget is None:
        counts, ranks = _rounded(preference, modules, limits)
    else:
        counts, ranks = _budgeted(preference, modules, limits, _resolve(budget, router), router)
    found = dict(zip((module.name for module in modules), _split(ranks, counts), strict=True))
    top_ks = {module.name: min(module.top_k, count) for module, count in zip(modules, counts, strict=True)}
    plans = {name: _plan(name, shape, found.get(name, ()), top_ks.get(name)) for name, shape in shapes.items()}
    return Allocation(plans, scaling=scaling, alpha=alpha, strategy=strategy)


def _plan(name: str, shape: tuple[int, int], ranks: tuple[int, ...], top_k: int | None) -> ModulePlan:
    """The plan of one module; without experts, top_k keeps its default so that unadapted modules look alike."""
    return plan_module(name, shape, ranks, 2 if top_k is None else top_k)


def _resolve(budget: int | Allocation, router: RouterCost) -> int:
    return same_budget(budget, router) if isinstance(budget, Allocation) else positive_int("budget", budget)


def _wishes(preference: Preference, modules: Sequence[Candidate], counts: Sequence[int]) -> list[float]:
    """The wished rank of every expert, module after module."""
    return [
        preference.rank_of(module.name, expert)
        for module, count in zip(modules, counts, strict=True)
        for expert in range(count)
    ]


def _rounded(preference: Preference, modules: Sequence[Candidate], limits: Limits) -> tuple[list[int], list[int]]:
    """Counts and flat ranks, each wish rounded by itself."""
    counts = rounded_counts(modules)
    wishes = _wishes(preference, modules, counts)
    return counts, [min(max(half_up(wish), 1), limits.rank_cap()) for wish in wishes]


def _budgeted(
    preference: Preference, modules: Sequence[Candidate], limits: Limits, budget: int, router: RouterCost
) -> tuple[list[int], list[int]]:
    """Counts and flat ranks that meet the budget."""
    if not modules:
        raise invalid("budget", budget, "None when no module is adapted", "Wish for experts in some module.")
    counts, shared = _counts_beside_shared(modules, limits, budget, router)
    routers = sum(module.router_cost(count, router) for module, count in zip(modules, counts, strict=True))
    units = [module.unit for module, count in zip(modules, counts, strict=True) for _ in range(count)]
    room = budget - routers - shared
    ranks = ranks_within(_wishes(preference, modules, counts), units, room, limits.rank_cap())
    left = room - sum(rank * unit for rank, unit in zip(ranks, units, strict=True))
    if min(ranks) == limits.rank_cap():
        _check_left(left, budget, min(units), limits)
    return counts, ranks


def _counts_beside_shared(
    modules: Sequence[Candidate], limits: Limits, budget: int, router: RouterCost
) -> tuple[list[int], int]:
    """Counts, and what their routers hold in common: which parts there are depends on the counts, and they on the rest.

    The reserve only grows, so that this ends: at the latest when the budget is too small for it.
    """
    reserve = 0
    while True:
        try:
            counts = counts_within(modules, budget - reserve, limits.rank_cap(), router)
        except GuilomoError as error:
            held = f" (That is without the {reserve} of {budget} parameters that routers share.)" if reserve else ""
            raise GuilomoError(f"{error}{held}") from None
        pairs = [(count, module.shape.in_features) for module, count in zip(modules, counts, strict=True)]
        shared = shared_parameters(pairs, router)
        if shared <= reserve:
            return counts, shared
        reserve = shared


def _check_left(left: int, budget: int, unit: int, limits: Limits) -> None:
    """GuilomoError if the caps, all reached, keep more than 1% of the budget and at least one rank row unused."""
    if left <= TOLERANCE * budget or left < unit:
        return
    caps = [f"{cap} (now {getattr(limits, cap)})" for cap in ("max_rank", "max_experts") if getattr(limits, cap)]
    remedy = f"Raise {' or '.join(caps)}, or lower the budget to {budget - left}."
    raise invalid("budget", budget, f"a budget that the caps allow to be used up; {left} would be left", remedy)


def _split(flat: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Cuts a flat list into one tuple per module."""
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [tuple(flat[start : start + count]) for start, count in zip(starts, counts, strict=True)]
