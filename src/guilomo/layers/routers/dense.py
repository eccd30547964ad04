"""Dense routing: every expert takes part, weighted by the softmax (LoRAMoE, arXiv 2312.09979)."""

from __future__ import annotations

from torch import Tensor

from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import Routing, Tokens, softmax_over_experts


class DenseRouter(LinearRouter):
    """Weights are the softmax over all E experts."""

    dense = True
    searchable = True

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        return Routing(softmax_over_experts(logits), logits)
