"""What all strategies by depth share: their keyword arguments, and one expert count and rank per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from typing_extensions import TypedDict, Unpack

from guilomo.allocation.budget import fit
from guilomo.allocation.costs import RouterCost
from guilomo.allocation.modules import positive_int
from guilomo.allocation.names import depths_of
from guilomo.allocation.plan import Allocation
from guilomo.allocation.preference import Preference
from guilomo.allocation.rounding import half_up
from guilomo.errors import invalid

Shapes = Mapping[str, tuple[int, int]]
"""Dotted module name -> (I, O)."""


class Shared(TypedDict, total=False):
    """Keyword arguments that every strategy hands to `fit` unchanged, with the meaning and defaults they have there."""

    alpha: float
    scaling: str
    router: RouterCost


class Common(Shared, total=False):
    """The same with the chosen experts K."""

    top_k: int
    top_k_floor: bool


class Terms(Common, total=False):
    """The same with the budget: a parameter count, or the plan whose parameters set it."""

    budget: int | Allocation | None


def layer_count(shapes: Shapes) -> int:
    """L: how many layers the modules belong to.

    Raises:
        GuilomoError: there are no modules.
    """
    if not shapes:
        raise invalid("shapes", dict(shapes), "at least one module", "Check the target names of the model.")
    return max(depths_of(shapes).values()) + 1


def by_layer(
    shapes: Shapes,
    experts: Sequence[float],
    ranks: Sequence[float],
    strategy: str,
    **terms: Unpack[Terms],
) -> Allocation:
    """A plan whose modules share the expert count and the rank of their layer.

    Args:
        shapes: module -> (I, O).
        experts: one count per layer, length L; 0 leaves the layer unadapted.
        ranks: one rank per layer, length L.
        strategy: recorded in the plan.
        terms: passed to `fit`.
    """
    layers = depths_of(shapes)
    wished = {name: float(experts[layer]) for name, layer in layers.items()}
    return fit(
        Preference(wished, {name: (float(ranks[layer]),) for name, layer in layers.items()}),
        shapes,
        strategy=strategy,
        **terms,
    )


def check_explicit(field: str, experts: Sequence[int], terms: Terms) -> None:
    """GuilomoError if a count that the user wrote down would be changed by the floor at top-k."""
    top_k = terms.get("top_k", 2)
    for count in experts:
        if count != 0:
            positive_int(field, count)
        if 0 < count < top_k and terms.get("top_k_floor", True):
            remedy = "Lower top_k, or give top_k_floor=False to let such modules use all of their experts."
            raise invalid(field, count, f"0 or at least top_k = {top_k}", remedy)


def spread_groups(groups: Sequence[int], layers: int) -> list[int]:
    """One value per layer from one value per block of layers, low layers first.

    The layers are cut into len(groups) consecutive blocks of nearly equal size, mirrored around the middle, so that
    a symmetric shape stays symmetric (4 groups on 6 layers: blocks of 2, 1, 1, 2). With more groups than layers,
    each layer takes the mean of the groups that fall on it, rounded to the nearest integer. Source: MoLA section 3
    for layer counts that the groups divide; the rest ours.
    """
    if len(groups) > layers:
        return [half_up(float(_mean_over(groups, layer, layers))) for layer in range(layers)]
    edges = [_edge(block, len(groups), layers) for block in range(len(groups) + 1)]
    return [value for block, value in enumerate(groups) for _ in range(edges[block + 1] - edges[block])]


def _edge(block: int, blocks: int, layers: int) -> int:
    """First layer of a block: rounded halves upwards before the middle, mirrored behind it."""
    if 2 * block > blocks:
        return layers - _edge(blocks - block, blocks, layers)
    return (2 * block * layers + blocks) // (2 * blocks)


def _mean_over(groups: Sequence[int], layer: int, layers: int) -> Fraction:
    """Mean of the step function `groups` over the part of the depth that one layer takes up."""
    start, stop = (Fraction(edge * len(groups), layers) for edge in (layer, layer + 1))
    overlaps = (min(stop, Fraction(index + 1)) - max(start, Fraction(index)) for index in range(len(groups)))
    total = sum(
        (value * max(overlap, Fraction(0)) for value, overlap in zip(groups, overlaps, strict=True)), Fraction(0)
    )
    return total / (stop - start)
