"""Top-k of the softmax over all experts, not renormalised (FlexOlmo; FlexMoRE, arXiv 2602.08818)."""

from __future__ import annotations

import torch
from torch import Tensor

from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.topk import largest
from guilomo.layers.routing import Routing, Tokens, softmax_over_experts


class TopKOfSoftmaxRouter(LinearRouter):
    """Chooses K experts per token, weighted by their probabilities among all E; ties go to the lowest index.

    The weights of a token sum to less than 1, by what the softmax gave to the experts left out.
    """

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        probabilities = softmax_over_experts(logits)
        if self.top_k == self.experts:
            return Routing(probabilities, logits)
        _, kept = largest(logits.detach(), self.top_k)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
        return Routing(probabilities * chosen, logits, kept)
