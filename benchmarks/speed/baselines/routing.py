"""Top-k routing as the compared codes do it: a gate in the input's dtype, its softmax in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def choose(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and indices ``(T, K)`` of the chosen experts; ``x (T, I)``, ``router (E, I)``.

    The kept probabilities are renormalised; for K = 1 the weight is the probability, as renormalising would leave the
    router without a gradient.
    """
    logits = F.linear(x, router)
    probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, chosen = probabilities.topk(top_k, dim=-1)
    if top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen
