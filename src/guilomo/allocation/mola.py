"""MoLA's shapes: expert counts by blocks of layers (arXiv 2402.08562)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from typing_extensions import Unpack

from guilomo.allocation.layerwise import Shapes, Terms, by_layer, check_explicit, layer_count, spread_groups
from guilomo.allocation.modules import positive_int
from guilomo.allocation.plan import Allocation
from guilomo.errors import invalid, unknown

MOLA_SHAPES: Mapping[str, tuple[int, ...]] = {
    "triangle": (8, 6, 4, 2),
    "inverted_triangle": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "diamond": (2, 8, 8, 2),
    "rectangle": (5, 5, 5, 5),
}
"""Experts per block, low layers first; each sums to 20 (MoLA section 3; the diamond is in the NAACL version)."""


def mola(
    shapes: Shapes,
    shape: str | Sequence[int] = "inverted_triangle",
    rank: int = 8,
    *,
    groups: Sequence[int] | None = None,
    **terms: Unpack[Terms],
) -> Allocation:
    """Expert counts by depth, all of one rank, the same for all modules of a layer. A budget scales the ranks.

    Args:
        shapes: module -> (I, O).
        shape: a name of MOLA_SHAPES, a string such as "2-4-6-8", or the counts themselves.
        rank: of every expert.
        groups: the counts, if not given as `shape`; any number of blocks, 0 leaves a block unadapted.
            See `spread_groups` for how blocks fall on layers.
        terms: see `fit`.

    Raises:
        GuilomoError: no such shape, or a count below top_k while top_k_floor holds.
    """
    positive_int("rank", rank)
    blocks = read_groups(shape if groups is None else groups)
    check_explicit("groups", blocks, terms)
    layers = layer_count(shapes)
    label = f"mola({'-'.join(map(str, blocks))}, rank={rank})"
    return by_layer(shapes, spread_groups(blocks, layers), [rank] * layers, label, **terms)


def read_groups(shape: str | Sequence[int]) -> tuple[int, ...]:
    """The counts per block from a shape's name, a string of counts with dashes, or a sequence.

    Raises:
        GuilomoError: none of the three.
    """
    if isinstance(shape, str):
        if re.fullmatch(r"\d+(-\d+)+", shape):
            return tuple(map(int, shape.split("-")))
        if shape not in MOLA_SHAPES:
            raise unknown("shape", shape, [*MOLA_SHAPES, "counts such as 2-4-6-8"])
        return MOLA_SHAPES[shape]
    if not shape:
        raise invalid("groups", shape, "at least one expert count", "Write groups=[2, 4, 6, 8], low layers first.")
    return tuple(shape)
