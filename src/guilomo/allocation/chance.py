"""Plans made by chance: the controls that any learned plan has to beat."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from typing_extensions import Unpack

from guilomo.allocation.budget import fit, same_budget
from guilomo.allocation.candidate import Limits, candidates
from guilomo.allocation.costs import linear_router
from guilomo.allocation.layerwise import Common, Shapes, layer_count
from guilomo.allocation.modules import positive_int
from guilomo.allocation.plan import Allocation
from guilomo.allocation.preference import Preference
from guilomo.errors import invalid


def random_plan(
    shapes: Shapes,
    budget: int | Allocation | None = None,
    seed: int = 0,
    *,
    min_experts: int | None = None,
    max_experts: int = 8,
    max_rank: int = 8,
    **terms: Unpack[Common],
) -> Allocation:
    """Random expert counts and ranks at a given budget.

    Every module draws its count uniformly from min_experts..max_experts and each expert its rank from 1..max_rank;
    `fit` then meets the budget under the same two caps. Each module draws from its own generator, seeded with the seed
    and its name: the order of `shapes`, or a further module, does not change what a module draws. Where modules may go
    unadapted, chance also decides which drawn ones the budget cannot pay, and which others help to use it up. Source:
    ours.

    Args:
        shapes: module -> (I, O).
        budget, terms: see `fit`.
        seed: of all draws.
        min_experts: fewest experts of a module; unset: top_k, or 1 without its floor. 0 lets modules go unadapted.
        max_experts, max_rank: most experts of a module, highest rank of an expert.

    Raises:
        GuilomoError: the seed or min_experts is not usable, or as `fit`.
    """
    _check_seed(seed)
    positive_int("max_experts", max_experts)
    positive_int("max_rank", max_rank)
    layer_count(shapes)
    low = terms.get("top_k", 2) if terms.get("top_k_floor", True) else 1
    fewest = _fewest(min_experts, low, max_experts)
    draws = {name: random.Random(f"{seed}:{name}") for name in shapes}
    experts = {name: float(draw.randint(fewest, max_experts)) for name, draw in draws.items()}
    ranks = {name: tuple(draw.randint(1, max_rank) for _ in range(max_experts)) for name, draw in draws.items()}
    if fewest == 0 and budget is not None:
        order = sorted(shapes, key=lambda name: (draws[name].random(), name))
        kept = _adapted(order, Preference(experts, ranks), shapes, budget, (max_experts, max_rank), terms)
        experts = {name: max(count, 1.0) if name in kept else 0.0 for name, count in experts.items()}
    return fit(
        Preference(experts, ranks),
        shapes,
        budget=budget,
        max_experts=max_experts,
        max_rank=max_rank,
        strategy=f"random(seed={seed}, experts={fewest}-{max_experts}, max_rank={max_rank})",
        **terms,
    )


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise invalid("seed", seed, "an integer")


def _fewest(min_experts: int | None, low: int, max_experts: int) -> int:
    if min_experts is None:
        return min(low, max_experts)
    if isinstance(min_experts, bool) or not isinstance(min_experts, int) or not 0 <= min_experts <= max_experts:
        remedy = "Lower min_experts or raise max_experts."
        raise invalid("min_experts", min_experts, f"an integer from 0 to max_experts = {max_experts}", remedy)
    return min_experts


def _adapted(
    order: list[str],
    drawn: Preference,
    shapes: Shapes,
    budget: int | Allocation,
    caps: tuple[int, int],
    terms: Common,
) -> set[str]:
    """The modules that are adapted: in `order`, those that drew experts, then others until the budget can be used up.

    None that the budget cannot pay at its fewest experts of rank 1 beside those before it.
    """
    router, floor = terms.get("router", linear_router), terms.get("top_k_floor", True)
    room = same_budget(budget, router) if isinstance(budget, Allocation) else positive_int("budget", budget)
    all_wished = Preference(dict.fromkeys(shapes, 1.0), drawn.ranks)
    limits = Limits(terms.get("top_k", 2), floor, *caps)
    modules = {module.name: module for module in candidates(all_wished, shapes, limits)}
    kept: set[str] = set()
    least = most = 0
    for name in sorted(order, key=lambda name: drawn.experts[name] == 0):
        cheapest = modules[name].cost(modules[name].low, 1, router)
        if (drawn.experts[name] > 0 or most < room) and least + cheapest <= room:
            kept.add(name)
            least, most = least + cheapest, most + modules[name].cost(*caps, router)
    if not kept:
        smallest = min(module.cost(module.low, 1, router) for module in modules.values())
        remedy = "Raise the budget, or adapt smaller modules."
        raise invalid("budget", room, f"at least {smallest}, the cheapest module at rank 1", remedy)
    return kept


def shuffled(plan: Allocation, seed: int = 0) -> Allocation:
    """The same experts in other places: module plans dealt out anew among the modules of equal shape.

    It costs exactly as much as `plan` and has the same counts and ranks; only where they are is left to chance. So a
    plan that beats its shuffled one owes that to the places it chose, not to how evenly it spends. Source: ours.

    Args:
        plan: what to shuffle. seed: of the deal.

    Raises:
        GuilomoError: the seed is not an integer.
    """
    _check_seed(seed)
    names = defaultdict(list)
    for name in sorted(plan.modules):
        names[plan[name].shape].append(name)
    draw = random.Random(f"shuffled:{seed}")
    dealt: dict[str, Any] = {}
    for alike in names.values():
        dealt |= zip(alike, draw.sample([plan[name] for name in alike], len(alike)), strict=True)
    modules = {name: dealt[name] for name in plan.modules}
    return Allocation(modules, plan.scaling, plan.alpha, f"shuffled(seed={seed}) of {plan.strategy}")
