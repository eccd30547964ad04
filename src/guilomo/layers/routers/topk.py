"""Top-k routing: softmax over all experts, keep the K largest, renormalise (MoLA, arXiv 2402.08562; GuiLoMo)."""

from __future__ import annotations

import torch
from torch import Tensor

from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import Routing


class TopKRouter(LinearRouter):
    """Chooses K experts per token; ties go to the lowest index.

    For K > 1 the kept probabilities are renormalised to sum 1, which equals a softmax over the kept logits.

    For K = 1 renormalising would make every weight exactly 1 and every gradient of the router exactly 0, so the
    weight is the probability itself, as in the Switch transformer (arXiv 2101.03961).
    """

    def route(self, logits: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        if self.top_k == self.experts:
            return Routing(probabilities, probabilities, torch.ones_like(logits, dtype=torch.bool), logits)
        kept = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
        if self.top_k == 1:
            weights = probabilities * chosen
        else:
            weights = logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)
        return Routing(weights, probabilities, chosen, logits)
