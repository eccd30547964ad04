"""Dynamic routing by probability mass: "Harder Tasks Need More Experts" (arXiv 2403.07652), on LoRA experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens, softmax_over_experts


class TopPRouter(LinearRouter):
    """Keeps the fewest experts whose softmax probabilities reach `mass`; ties go to the lowest index.

    The router's own loss is the token's entropy ``-sum p log p`` over all experts (experimental: that there is such a
    loss is second-hand knowledge, its form and the coefficient 1e-4 we only remember). Without it a router can become
    flat, and then many experts are needed. The balance loss that goes with it is
    ``balance_loss: switch_per_slot``, whose counts are then those of the kept sets.

    Options:
        mass: P in [0, 1]; 0 keeps one expert, 1 keeps all. 0.4 in the released configuration.
        renormalize: never (as released: weights are the probabilities) or top_p (kept weights sum to 1).
    """

    dense = True
    own_loss = True

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        mass: float = 0.4,
        renormalize: str = "never",
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        self.mass, self.renormalize = mass, renormalize

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_number(option("mass"), options["mass"], at_least=0, at_most=1)
        expect_choice(option("renormalize"), options["renormalize"], ("never", "top_p"))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        p = softmax_over_experts(logits)
        kept = fewest_with_mass(p.detach(), self.mass)
        weights = p * kept
        if self.renormalize == "top_p":
            weights = weights / weights.sum(-1, keepdim=True)
        penalty = -(p * logits.log_softmax(-1)).sum(-1) if self.training else None
        return Routing(weights, logits, kept, penalty)


def fewest_with_mass(p: Tensor, mass: float) -> Tensor:
    """``(..., E)`` bool: the shortest prefix, in descending order, of ``p (..., E)`` whose sum is at least `mass`."""
    if mass >= 1:
        return torch.ones_like(p, dtype=torch.bool)
    ordered, places = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < mass
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, places, kept)
