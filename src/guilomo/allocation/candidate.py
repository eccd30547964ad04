"""A module whose expert count is still to be decided."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from guilomo.allocation.costs import RouterCost
from guilomo.allocation.modules import ModuleShape, positive_int
from guilomo.allocation.preference import Preference
from guilomo.errors import GuilomoError, invalid, unknown

UNLIMITED = sys.maxsize


class Candidate(NamedTuple):
    """One adapted module: its wish and the bounds of its expert count E."""

    name: str
    shape: ModuleShape
    top_k: int
    wish: float
    low: int
    high: int

    @property
    def unit(self) -> int:
        """Parameters of one rank row: I+O."""
        return self.shape.in_features + self.shape.out_features

    def router_cost(self, experts: int, router: RouterCost) -> int:
        """Parameters of the router over `experts` experts."""
        return router(experts, self.shape.in_features)

    def cost(self, experts: int, rank: int, router: RouterCost) -> int:
        """Parameters with `experts` experts that all have rank `rank`."""
        return experts * rank * self.unit + self.router_cost(experts, router)


class Limits(NamedTuple):
    """Bounds that hold for all modules."""

    top_k: int | Mapping[str, int]
    top_k_floor: bool
    max_experts: int | None
    max_rank: int | None

    def rank_cap(self) -> int:
        """max_rank, or a number that never binds."""
        return self.max_rank or UNLIMITED


def check_limits(limits: Limits) -> None:
    """GuilomoError unless every given limit is a positive integer."""
    top_ks = limits.top_k.values() if isinstance(limits.top_k, Mapping) else (limits.top_k,)
    for top_k in top_ks:
        positive_int("top_k", top_k)
    for field in ("max_experts", "max_rank"):
        if getattr(limits, field) is not None:
            positive_int(field, getattr(limits, field))


def candidates(preference: Preference, shapes: Mapping[str, tuple[int, int]], limits: Limits) -> list[Candidate]:
    """The modules to adapt, sorted by name so that the order of `shapes` cannot change a plan.

    Raises:
        GuilomoError: shapes and preference do not name the same modules, or max_experts is below top-k.
    """
    for name in preference.experts:
        if name not in shapes:
            raise unknown("module of the preference", name, shapes)
    for name in shapes:
        if name not in preference.experts:
            remedy = "Wish for 0 experts to leave it unadapted."
            raise invalid(f"wished experts of module {name!r}", None, "a number for every module", remedy)
    wished = sorted(name for name, wish in preference.experts.items() if wish > 0)
    return [_candidate(name, preference.experts[name], ModuleShape(*shapes[name]), limits) for name in wished]


def _candidate(name: str, wish: float, shape: ModuleShape, limits: Limits) -> Candidate:
    try:
        positive_int("in_features", shape.in_features)
        positive_int("out_features", shape.out_features)
    except GuilomoError as error:
        raise GuilomoError(f"module {name!r}: {error}") from None
    top_k = limits.top_k[name] if isinstance(limits.top_k, Mapping) else limits.top_k
    low = top_k if limits.top_k_floor else 1
    high = limits.max_experts or UNLIMITED
    if high < low:
        remedy = "Raise max_experts, lower top_k, or give top_k_floor=False."
        raise invalid("max_experts", high, f"at least top_k = {low} (module {name!r})", remedy)
    return Candidate(name, shape, top_k, wish, low, high)
