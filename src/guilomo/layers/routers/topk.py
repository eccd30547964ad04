"""Top-k routing: softmax over all experts, keep the K largest, renormalise (MoLA, arXiv 2402.08562; GuiLoMo)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import Routing, Tokens, softmax_over_experts


class TopKRouter(LinearRouter):
    """Chooses K experts per token; ties go to the lowest index.

    For K > 1 the kept probabilities are renormalised to sum 1, which equals a softmax over the kept logits.

    For K = 1 renormalising would make every weight exactly 1 and every gradient of the router exactly 0, so the
    weight is the probability itself, as in the Switch transformer (arXiv 2101.03961).
    """

    searchable = True

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        if self.top_k == self.experts:
            return Routing(softmax_over_experts(logits), logits)
        if self.top_k > 1 and not torch.is_grad_enabled():
            values, kept = largest(logits, self.top_k)
            return Routing(softmax_over_experts(values), logits, kept)
        _, kept = largest(logits.detach(), self.top_k)
        if self.top_k == 1:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
            return Routing(softmax_over_experts(logits) * chosen, logits, kept)
        return Routing(softmax_over_kept(logits, kept), logits, kept)


def softmax_over_kept(logits: Tensor, kept: Tensor) -> Tensor:
    """``(..., E)``: the softmax over the kept ``(..., K)`` of ``logits (..., E)``, and 0 elsewhere."""
    if torch.compiler.is_compiling():
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
        return softmax_over_experts(logits.masked_fill(~chosen, float("-inf"))) * chosen
    weights: Tensor = _SoftmaxOverKept.apply(logits, kept)
    return weights


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``(..., k)`` values and indices of the `k` largest of ``(..., E)``; of equal ones the lowest index comes first.

    `torch.topk` does not say which of equal ones it takes.
    """
    if torch.compiler.is_compiling() or k > 2 or logits.shape[:-1].numel() < 64:
        values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values[..., :k], indices[..., :k]
    # For many tokens two passes are faster than sorting.
    value, first = logits.max(-1, keepdim=True)
    if k == 1:
        return value, first
    # What is at -inf already stays above the one taken out, which would otherwise be found again.
    least = torch.finfo(logits.dtype).min
    next_value, second = logits.clamp_min(least).scatter(-1, first, float("-inf")).max(-1, keepdim=True)
    return torch.cat([value, next_value], dim=-1), torch.cat([first, second], dim=-1)


class _SoftmaxOverKept(torch.autograd.Function):
    """``(..., E)``: softmax over the kept logits, 0 elsewhere. Saves only its result."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kept: Tensor) -> Tensor:
        weights = torch.zeros_like(logits).scatter_(-1, kept, softmax_over_experts(logits.gather(-1, kept)))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, d_weights: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        moved = weights * d_weights
        return moved - weights * moved.sum(-1, keepdim=True), None
