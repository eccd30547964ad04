"""A plan whose experts share one A, at the price of the plan it came from."""

from __future__ import annotations

from dataclasses import replace

from guilomo.allocation.costs import expert_parameters
from guilomo.allocation.modules import ModulePlan
from guilomo.allocation.plan import Allocation


def with_shared_a(plan: Allocation) -> Allocation:
    """The same experts with one A per module (HydraLoRA, arXiv 2404.19245), each module at most as dear as before.

    All E experts of a module get the highest common rank r with ``r (I + E O)`` no more than its experts cost in
    `plan`; less than one such row stays unspent. Routers, top-k and modules with one expert stay. Source: ours.
    """
    modules = {name: _shared(module) if module.experts > 1 else module for name, module in plan.modules.items()}
    return Allocation(modules, scaling=plan.scaling, alpha=plan.alpha, strategy=f"{plan.strategy}, shared A")


def _shared(module: ModulePlan) -> ModulePlan:
    row = module.in_features + module.experts * module.out_features
    rank = expert_parameters(module) // row
    return replace(module, ranks=(rank,) * module.experts, shared_a=True)
