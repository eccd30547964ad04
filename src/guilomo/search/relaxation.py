"""From selection vectors to masks: two relaxations of "the first n of N".

A selection vector ``g (..., N)`` prefers each of the counts 1..N. A mask ``m (..., N)`` says how much of component j
takes part. Both relaxations work on any number of leading dimensions.

survival (ours): ``pi = softmax(g / temperature)``, ``m_j = sum_{i >= j} pi_i``, the probability that the count is at
    least j. Every entry of g has a gradient of the right sign for growing and for shrinking.
prefix (GuiLoMo, arXiv 2506.14646, as its code has it): ``m_j = 1`` for ``j <= argmax g``; the gradient of all kept
    components goes to the chosen entry alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RANK_LEAK = 1e-4
"""What `prefix` leaves of components beyond the chosen rank (as in the released code)."""
EXPERT_SHIFT, EXPERT_BLOCK = 0.5, -1e4
"""What `prefix` adds to the logits of kept and of removed experts (authors' code; the first is without effect)."""
SURVIVAL_FLOOR = 1e-4
"""Keeps the log of a survival mask finite, so that a removed expert can still come back."""


def survival(g: Tensor, temperature: float) -> Tensor:
    """Survival mask of a preference over counts: ``out_j = P(count >= j-th count)``, shaped like `g`.

    The first entry is exactly 1, whatever the smallest count is.
    """
    pi = (g / temperature).softmax(dim=-1)
    beyond = pi.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return torch.cat([torch.ones_like(pi[..., :1]), beyond], dim=-1)


def expected_count(mask: Tensor) -> Tensor:
    """Expected number of components ``(...)``: the sum of a survival mask."""
    return mask.sum(-1)


def harden(mask: Tensor) -> Tensor:
    """0/1 in the forward pass (kept where the soft mask is at least one half), the soft gradient in the backward."""
    hard = (mask >= 0.5).to(mask.dtype)
    return hard + (mask - mask.detach())  # the bracket is exactly 0


def log_survival(mask: Tensor) -> Tensor:
    """Log of a survival mask, with a floor; added to router logits it scales an expert's odds by the mask."""
    return torch.log(SURVIVAL_FLOOR + (1 - SURVIVAL_FLOOR) * mask)


class _Prefix(torch.autograd.Function):
    """Forward: ``kept`` up to the chosen index, ``removed`` beyond. Backward: the straight-through rule."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, kept: float, removed: float, leak: float, least: int) -> Tensor:
        chosen = g.argmax(-1, keepdim=True).clamp_min(least - 1)
        inside = torch.arange(g.shape[-1], device=g.device) <= chosen
        ctx.save_for_backward(g, chosen, inside)
        ctx.leak = leak
        return torch.where(inside, kept, removed).to(g.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        g, chosen, inside = ctx.saved_tensors
        h = g.sigmoid()
        collected = (grad * h * inside).sum(-1, keepdim=True)
        out = (ctx.leak * grad).scatter(-1, chosen, collected)
        return out * h * (1 - h), None, None, None, None


def prefix_rank_mask(g: Tensor) -> Tensor:
    """Rank mask ``(..., R)`` of the paper's rule: 1 up to the argmax, a leak beyond."""
    out: Tensor = _Prefix.apply(g, 1.0, RANK_LEAK, RANK_LEAK, 1)
    return out


def prefix_log_expert(g: Tensor, least: int) -> Tensor:
    """Offset ``(..., E)`` on router logits of the paper's rule; at least `least` experts are kept."""
    out: Tensor = _Prefix.apply(g, EXPERT_SHIFT, EXPERT_BLOCK, 0.0, least)
    return out


def prefix_count(g: Tensor, least: int = 1) -> Tensor:
    """The chosen count ``(...)``: index of the largest entry, 1-based; ties go to the lowest."""
    return (g.argmax(-1) + 1).clamp_min(least).to(g.dtype)
