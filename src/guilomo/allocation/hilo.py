"""HiLo: expert count by blocks of layers and rank on a ramp (arXiv 2502.03884)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import Unpack

from guilomo.allocation.layerwise import Shapes, Terms, by_layer, check_explicit, layer_count, spread_groups
from guilomo.allocation.modules import positive_int
from guilomo.allocation.mola import read_groups
from guilomo.allocation.plan import Allocation
from guilomo.allocation.rounding import half_up
from guilomo.errors import invalid, unknown

RAMPS: Mapping[str, tuple[float, float]] = {
    "increasing": (0.0, 1.0),
    "decreasing": (1.0, 0.0),
    "uniform": (0.5, 0.5),
}
"""Where between min_rank and max_rank the first and the last layer lie (GuiLoMo's rank baselines Inc, Dec, Uni)."""


def hilo(
    shapes: Shapes,
    experts: int | None = None,
    groups: str | Sequence[int] = "inverted_triangle",
    min_rank: int = 2,
    max_rank: int = 16,
    ramp: str = "increasing",
    **terms: Unpack[Terms],
) -> Allocation:
    """Experimental: counts by blocks of layers, and a rank that changes linearly with depth.

    The paper's numbers could not be checked against the paper itself (they come from summaries), so the defaults
    are a reading of it, not a reproduction.

    Args:
        shapes: module -> (I, O).
        experts: one count for all layers; overrides `groups`.
        groups: counts per block, as in `mola`.
        min_rank, max_rank: ends of the ramp. They are wishes: a budget scales all ranks.
        ramp: one of RAMPS; "uniform" is the mean of the two ends everywhere.
        terms: see `fit`.

    Raises:
        GuilomoError: an unknown ramp, a count or rank that cannot be, or min_rank above max_rank.
    """
    blocks = read_groups(groups) if experts is None else (positive_int("experts", experts),)
    check_explicit("groups" if experts is None else "experts", blocks, terms)
    layers = layer_count(shapes)
    label = f"hilo({'-'.join(map(str, blocks))}, ranks={min_rank}..{max_rank} {ramp})"
    ranks = rank_ramp(layers, min_rank, max_rank, ramp)
    return by_layer(shapes, spread_groups(blocks, layers), ranks, label, **terms)


def rank_ramp(layers: int, min_rank: int, max_rank: int, ramp: str = "increasing") -> list[int]:
    """r_l = round(r_min + (r_max - r_min)(l-1)/(L-1)) for l = 1..L; a single layer gets the ramp's first value.

    Raises:
        GuilomoError: an unknown ramp, ranks below 1, or min_rank above max_rank.
    """
    positive_int("min_rank", min_rank)
    positive_int("max_rank", max_rank)
    if min_rank > max_rank:
        raise invalid("min_rank", min_rank, f"at most max_rank = {max_rank}", "Use ramp='decreasing' to fall.")
    if ramp not in RAMPS:
        raise unknown("ramp", ramp, RAMPS)
    first, last = (min_rank + end * (max_rank - min_rank) for end in RAMPS[ramp])
    return [half_up(first + (last - first) * layer / max(layers - 1, 1)) for layer in range(layers)]
