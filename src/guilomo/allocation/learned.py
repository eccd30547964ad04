"""Plans read off a search."""

from __future__ import annotations

from typing_extensions import Unpack

from guilomo.allocation.budget import fit
from guilomo.allocation.layerwise import Common, Shapes
from guilomo.allocation.plan import Allocation
from guilomo.allocation.preference import Preference


def learned(
    preference: Preference,
    shapes: Shapes,
    budget: int | Allocation | None = None,
    *,
    max_experts: int | None = None,
    max_rank: int | None = None,
    strategy: str = "learned",
    **terms: Unpack[Common],
) -> Allocation:
    """The plan nearest to what a search learned, at the given budget: `fit` under the name of a strategy.

    Raises:
        GuilomoError: as `fit`.
    """
    return fit(
        preference,
        shapes,
        budget=budget,
        max_experts=max_experts,
        max_rank=max_rank,
        strategy=strategy,
        **terms,
    )
