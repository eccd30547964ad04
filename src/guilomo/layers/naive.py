"""The reference: the same mixture as `guilomo.layers.packed`, written as the equations read.

One loop over experts, one over tokens for the choice of experts. Slow on purpose; tests compare every fast path with
it, outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def naive_topk_weights(logits: Tensor, top_k: int) -> Tensor:
    """Routing weights ``(T, E)`` token by token: softmax, keep the `top_k` largest, renormalise unless it is 1."""
    experts = logits.shape[-1]
    rows = []
    for token in logits:
        probabilities = torch.exp(token - token.max()) / torch.exp(token - token.max()).sum()
        ranked = sorted(range(experts), key=lambda e: (-float(token[e].detach()), e))
        kept = ranked[:top_k]
        total = probabilities[kept].sum() if top_k > 1 else logits.new_ones(())
        zero = logits.new_zeros(())
        rows.append(torch.stack([probabilities[e] / total if e in kept else zero for e in range(experts)]))
    return torch.stack(rows) if rows else logits.new_zeros(0, experts)


def naive_sparsegen(u: Tensor, lam: Tensor) -> Tensor:
    """``(T, E)`` from ``u (T, E)`` and ``lam (T, 1)``, as the closed form of LD-MoLE (arXiv 2509.25684) reads."""
    rows = []
    for scores, one in zip(u, lam[:, 0], strict=True):
        ordered = scores.sort(descending=True).values
        sums = [ordered[:j].sum() for j in range(1, len(scores) + 1)]
        k = max(j for j in range(1, len(scores) + 1) if 1 - one + j * ordered[j - 1] > sums[j - 1])
        tau = (sums[k - 1] - 1 + one) / k
        rows.append((scores - tau).clamp_min(0) / (1 - one))
    return torch.stack(rows)


def naive_delta(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, ranks: Sequence[int], scales: Sequence[float]
) -> Tensor:
    """``sum_e weights[:, e] * s_e * B_e A_e x`` with one pair of products per expert.

    Args:
        x: ``(T, I)``; a: ``(R, I)``; b: ``(O, R)``; weights: ``(T, E)``; ranks, scales: one per expert.
    """
    out = x.new_zeros(x.shape[0], b.shape[0])
    start = 0
    for expert, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        a_e, b_e = a[start : start + rank], b[:, start : start + rank]
        out = out + weights[:, expert : expert + 1] * scale * ((x @ a_e.T) @ b_e.T)
        start += rank
    return out
