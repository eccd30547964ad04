"""Dense routing: every expert takes part, weighted by the softmax (LoRAMoE, arXiv 2312.09979)."""

from __future__ import annotations

import torch
from torch import Tensor

from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import Routing


class DenseRouter(LinearRouter):
    """Weights are the softmax over all E experts."""

    dense = True

    def route(self, logits: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        return Routing(probabilities, probabilities, torch.ones_like(logits, dtype=torch.bool), logits)
