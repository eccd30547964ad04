"""Plans that spend a budget on one kind of growth: for methods whose experts are no plain mixture (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from guilomo.allocation import Allocation, ModulePlan, RouterCost
from guilomo.allocation.blocks import check_blocks
from guilomo.allocation.costs import module_parameters
from guilomo.errors import GuilomoError

Growth = Callable[[ModulePlan], ModulePlan]


def filled_plan(least: Allocation, budget: int, router: RouterCost, grow: Growth) -> Allocation:
    """The plan that comes from `least` by growing modules in turn, as long as one more step of some module fits.

    Every module grows once before any grows twice, so the plan is as even as the budget lets it be; the linears of a
    feed-forward block grow together.

    Args:
        least: the smallest plan. budget: trainable parameters, routers included. router: what routers cost.
        grow: the next larger plan of a module.

    Raises:
        GuilomoError: even the smallest plan overruns the budget.
    """
    modules = dict(least.modules)
    left = budget - least.parameters(router)
    if left < 0:
        raise GuilomoError(
            f"budget = {budget:,} parameters is not usable: the smallest plan of this method has "
            f"{least.parameters(router):,}. Raise the budget, or adapt fewer modules."
        )
    groups = _growing_together(modules)
    grew = True
    while grew:
        grew = False
        for group in groups:
            grown = {name: grow(modules[name]) for name in group}
            price = sum(module_parameters(grown[n], router) - module_parameters(modules[n], router) for n in group)
            if 0 < price <= left:
                modules.update(grown)
                left -= price
                grew = True
    check_blocks(modules)
    return replace(least, modules=modules)


def _growing_together(modules: dict[str, ModulePlan]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.adapted:
            groups.setdefault(module.block or name, []).append(name)
    return list(groups.values())


def more_rank(module: ModulePlan) -> ModulePlan:
    """One more rank for every expert, and for a sequential branch."""
    sequential = module.sequential_rank + 1 if module.sequential_rank else 0
    return replace(module, ranks=tuple(rank + 1 for rank in module.ranks), sequential_rank=sequential)


def one_expert_more(module: ModulePlan) -> ModulePlan:
    """One more expert of rank 1."""
    return replace(module, ranks=(*module.ranks, 1))


def with_top_k(plan: Allocation, share: float, scale_by: str) -> Allocation:
    """The plan with K the same share of the mean number of experts everywhere, at least 2 of them.

    Args:
        plan: of experts of rank 1. share: of the experts that are chosen.
        scale_by: what alpha is divided by: "chosen" experts, all "experts", or nothing.
    """
    adapted = plan.adapted()
    experts = sum(module.experts for module in adapted.values()) / len(adapted)
    top_k = min(max(2, round(share * experts)), *(module.experts for module in adapted.values()))
    modules = {n: replace(m, top_k=top_k) if m.adapted else m for n, m in plan.modules.items()}
    by = {"chosen": top_k, "experts": experts, "": 1}[scale_by]
    return replace(plan, modules=modules, alpha=plan.alpha / by)
