"""The same experts everywhere."""

from __future__ import annotations

from typing_extensions import Unpack

from guilomo.allocation.layerwise import Shapes, Terms, by_layer, check_explicit, layer_count
from guilomo.allocation.modules import positive_int
from guilomo.allocation.plan import Allocation
from guilomo.errors import invalid


def uniform(shapes: Shapes, experts: int = 4, rank: int = 8, **terms: Unpack[Terms]) -> Allocation:
    """`experts` experts of rank `rank` in every module (MoLA's rectangle). A budget scales the ranks.

    Raises:
        GuilomoError: a count below 1, or fewer experts than top_k while top_k_floor holds.
    """
    positive_int("experts", experts)
    positive_int("rank", rank)
    check_explicit("experts", [experts], terms)
    layers = layer_count(shapes)
    label = f"uniform(experts={experts}, rank={rank})"
    return by_layer(shapes, [experts] * layers, [rank] * layers, label, **terms)


def lora(shapes: Shapes, rank: int = 8, **terms: Unpack[Terms]) -> Allocation:
    """Plain LoRA (Hu et al. 2021) as a plan: one expert per module, gate 1, no router.

    Raises:
        GuilomoError: a rank below 1, or a top_k other than 1.
    """
    positive_int("rank", rank)
    if terms.setdefault("top_k", 1) != 1:
        raise invalid("top_k", terms["top_k"], "1, for LoRA is one expert", "Use the strategy 'uniform' for more.")
    layers = layer_count(shapes)
    return by_layer(shapes, [1] * layers, [rank] * layers, f"lora(rank={rank})", **terms)
