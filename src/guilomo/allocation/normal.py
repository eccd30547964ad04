"""NormalE: a bell of expert counts over the layers, a baseline of GuiLoMo (arXiv 2506.14646)."""

from __future__ import annotations

from typing_extensions import Unpack

from guilomo.allocation.layerwise import Shapes, Terms, by_layer, layer_count
from guilomo.allocation.modules import positive_int
from guilomo.allocation.plan import Allocation
from guilomo.allocation.rounding import apportion
from guilomo.errors import invalid

RISING = (2, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 8, 8, 8)
BELL = (*RISING, *reversed(RISING))
"""Experts in layers 1..32, read off the GuiLoMo author's figure; their sum is 160."""


def normal(shapes: Shapes, mean_experts: float = 5.0, rank: int = 8, **terms: Unpack[Terms]) -> Allocation:
    """The bell over any number of layers, with `mean_experts` experts per module on average.

    The 32 published counts are interpolated linearly at the centres of the L layers, scaled, and rounded by largest
    remainder, so that 32 layers with mean 5 give them back exactly. Layers below top_k are then raised to it. All
    ranks are equal; a budget scales them. Source: the counts GuiLoMo's, resampling ours.

    Raises:
        GuilomoError: mean_experts is not a number of at least 1.
    """
    positive_int("rank", rank)
    if not 1 <= mean_experts < float("inf"):
        raise invalid("mean_experts", mean_experts, "a finite number of at least 1")
    layers = layer_count(shapes)
    counts = apportion([_bell((layer + 0.5) / layers) for layer in range(layers)], round(mean_experts * layers))
    label = f"normal(mean_experts={mean_experts:g}, rank={rank})"
    return by_layer(shapes, [max(1, count) for count in counts], [rank] * layers, label, **terms)


def _bell(depth: float) -> float:
    """The bell at relative depth 0..1, constant beyond the centres of the first and last of the 32 layers."""
    place = min(max(depth * len(BELL) - 0.5, 0.0), len(BELL) - 1.0)
    left = min(int(place), len(BELL) - 2)
    return BELL[left] + (place - left) * (BELL[left + 1] - BELL[left])
