"""Experts of a whole feed-forward, weighted behind its nonlinearity (MixLoRA, arXiv 2404.15159).

    y = sum_k w_k FFN_k(x)        FFN_k: the frozen feed-forward with the low-rank pairs of the k-th chosen expert

The linears that read x give their outputs for the K chosen experts, stacked along the leading dimension, slot after
slot: the frozen product is made once and the low-rank parts K times. What lies between, activations and products of
them, passes such a stack through. The last linear is linear in what it reads, so that one frozen product is enough
for it too:

    sum_k w_k (W a_k + b + B_k A_k a_k) = W (sum_k w_k a_k) + (sum_k w_k) b + B (sum_k w_k gate_k A a_k)

MixLoRA makes the last product for every chosen expert; that one is enough is ours, as is the stacking. The twin of the
tests runs the whole feed-forward once for every expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.routing import Routing


@dataclass(frozen=True)
class Slots:
    """The experts that each token of ``(N, ...)`` tokens visits.

    Attributes:
        experts: ``(K, N, ...)`` int64. weights: ``(K, N, ...)`` float32 or better.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, routing: Routing) -> Slots:
        """K slots where the router names K experts for every token, else one for each of the E experts."""
        if routing.kept is None or routing.kept.dtype == torch.bool:
            every = torch.arange(routing.logits.shape[-1], device=routing.logits.device)
            kept, weights = every.expand(routing.logits.shape), routing.weights
        else:
            kept = routing.kept
            weights = routing.given if routing.only_kept else routing.given.gather(-1, kept)
        return cls(kept.movedim(-1, 0), weights.movedim(-1, 0))

    def __len__(self) -> int:
        return len(self.experts)

    def scales(self, spread: Tensor) -> Tensor:
        """``(K, N, ..., R)``: the rows of ``spread (E, R)`` that belong to the expert of each slot."""
        return F.embedding(self.experts, spread)


def stacked_outputs(y: Tensor, h: Tensor, slots: Slots, spread: Tensor, b: Tensor) -> Tensor:
    """The outputs for every slot, ``(K N, ..., O)``, of a linear that reads x.

    Args:
        y: ``(N, ..., O)`` frozen output. h: ``(N, ..., R)`` rank activations. spread: ``(E, R)`` scales, see
            `guilomo.layers.packed.ExpertLayout`. b: ``(O, R)``.
    """
    gated = h * slots.scales(spread).to(h.dtype)
    return (y + F.linear(gated, b).to(y.dtype)).flatten(0, 1)


def beyond_one(slots: Slots) -> Tensor:
    """``(N, ...)``: by how much the weights of a token sum to more than 1; no more than rounding counts as 0.

    Where experts that have learned nothing all do the same, the outcome is then the frozen one to the last bit. The
    gradient is that of the sum.
    """
    excess = slots.weights.sum(0) - 1
    rounding = 4 * (len(slots) + 1) * torch.finfo(excess.dtype).eps
    return excess - torch.where(excess.abs() < rounding, excess, 0).detach()


def weighted_sum(a: Tensor, slots: Slots) -> Tensor:
    """``sum_k w_k a_k`` of ``a (K, N, ..., I)``, as ``a_1`` and the differences of the others from it."""
    first = a[0] * (1 + beyond_one(slots)).unsqueeze(-1).to(a.dtype)
    if len(slots) == 1:
        return first
    return first + ((a[1:] - a[0]) * slots.weights[1:].unsqueeze(-1).to(a.dtype)).sum(0)


def summed_delta(h: Tensor, slots: Slots, spread: Tensor, b: Tensor) -> Tensor:
    """What the experts add to the last linear's output, ``(N, ..., O)``.

    Args:
        h: ``(K, N, ..., R)`` rank activations of every slot. spread: ``(E, R)``. b: ``(O, R)``.
    """
    gate = slots.scales(spread).to(slots.weights.dtype) * slots.weights.unsqueeze(-1)
    return F.linear((h * gate.to(h.dtype)).sum(0), b)
