"""Random plans: the control that any learned plan has to beat."""

from __future__ import annotations

import random

from typing_extensions import Unpack

from guilomo.allocation.budget import fit
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
    max_experts: int = 8,
    max_rank: int = 8,
    **terms: Unpack[Common],
) -> Allocation:
    """Random expert counts and ranks at a given budget.

    Every module draws its count uniformly from top_k..max_experts and each expert its rank from 1..max_rank; `fit`
    then meets the budget under the same two caps. Each module draws from its own generator, seeded with the seed and
    its name: the order of `shapes`, or a further module, does not change what a module draws. Source: ours.

    Raises:
        GuilomoError: the seed is not an integer, or as `fit`.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise invalid("seed", seed, "an integer")
    positive_int("max_experts", max_experts)
    positive_int("max_rank", max_rank)
    layer_count(shapes)
    low = terms.get("top_k", 2) if terms.get("top_k_floor", True) else 1
    draws = {name: random.Random(f"{seed}:{name}") for name in shapes}
    experts = {name: float(draw.randint(min(low, max_experts), max_experts)) for name, draw in draws.items()}
    ranks = {name: tuple(draw.randint(1, max_rank) for _ in range(max_experts)) for name, draw in draws.items()}
    return fit(
        Preference(experts, ranks),
        shapes,
        budget=budget,
        max_experts=max_experts,
        max_rank=max_rank,
        strategy=f"random(seed={seed}, max_experts={max_experts}, max_rank={max_rank})",
        **terms,
    )
