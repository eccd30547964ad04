"""LD-MoLE: sparse projection onto the simplex with a learned temperature per token (arXiv 2509.25684, ICLR 2026).

    p = argmin over the simplex of |q - u|^2 - lambda |q|^2  =  sparsemax(u / (1 - lambda)),   lambda = f(x) < 1

How many experts take part is learned: lambda near 1 gives one, far below 0 gives all. At least one always does.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.layers.options import expect_number, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens, accumulation_dtype, without_autocast

EPSILON = 0.01
"""The least temperature ``1 - lambda``, as in the released code."""


class SparsegenRouter(LinearRouter):
    """Weights ``sparsegen(u, lambda)`` of linear scores u; lambda from an MLP that modules of equal I share.

    The router's own loss is the paper's analytic sparsity loss ``relu(lambda_low(k) - lambda)``: 0 for tokens of at
    most `target` experts. No gradient flows through the scores there. The released code fixes k = 2; its coefficient is
    ``router_loss_coefficient`` here (0: none).

    Options:
        hidden: width of the MLP. The released files have 256 and 512; which one the paper used is not known to us.
        target: the number k of experts that the own loss asks for at most.
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
        hidden: int = 256,
        target: int = 2,
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        assert isinstance(place.shared, LambdaMLP), "made by `shared` and handed to every router of this width"
        self.target = min(target, experts)
        self._held = (place.shared,)  # in a tuple, so that it is not registered: one module alone saves and trains it

    @classmethod
    def check_options(cls, **options: Any) -> None:
        for name in ("hidden", "target"):
            expect_number(option(name), options[name], at_least=1, whole=True)

    @classmethod
    def shared_key(cls, experts: int, in_features: int) -> Hashable:
        return in_features

    @classmethod
    def shared(cls, experts: int, in_features: int, **options: Any) -> LambdaMLP:
        return LambdaMLP(in_features, options["hidden"])

    @classmethod
    def shared_parameters(cls, experts: int, in_features: int, **options: Any) -> int:
        hidden: int = options["hidden"]
        return in_features * hidden + hidden + hidden + 1

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        lam = self._held[0](tokens.x).to(logits.dtype)
        weights = sparsegen(logits, lam)
        penalty = self._penalty(logits.detach(), lam) if self.training else None
        return Routing(weights, logits, weights.detach() > 0, penalty)

    def _penalty(self, logits: Tensor, lam: Tensor) -> Tensor:
        return (lowest_lambda(logits, self.target) - lam.squeeze(-1)).relu()


class LambdaMLP(nn.Module):
    """``(..., I) -> (..., 1)``: ``lambda = logsigmoid(W2 relu(W1 x + b1) + b2) + 1 - epsilon``, below ``1 - epsilon``.

    All biases start at -2.5, which makes lambda about -1.6: soft routing at first.
    """

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(hidden, in_features))
        self.up = nn.Parameter(torch.empty(1, hidden))
        self.down_bias = nn.Parameter(torch.full((hidden,), -2.5))
        self.up_bias = nn.Parameter(torch.full((1,), -2.5))
        for weight in (self.down, self.up):
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        home, dtype = self.down.device, accumulation_dtype(x.dtype)
        with without_autocast(home.type):
            y = F.linear(x.to(home, dtype), self.down.to(dtype), self.down_bias.to(dtype)).relu()
            y = F.linear(y, self.up.to(dtype), self.up_bias.to(dtype))
            return (F.logsigmoid(y) + (1 - EPSILON)).to(x.device)


def sparsegen(u: Tensor, lam: Tensor) -> Tensor:
    """Weights ``(..., E)`` on the simplex, with a backward of E operations per token.

    Args:
        u: ``(..., E)`` scores. lam: ``(..., 1)``; where it is above ``1 - EPSILON`` it is taken to be that, without
            gradient.
    """
    p: Tensor = _Sparsegen.apply(u, lam)
    return p


class _Sparsegen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, lam: Tensor) -> Tensor:
        temperature = (1 - lam).clamp_min(EPSILON)
        # Adding a constant to u changes nothing, so that the largest may be 0: no overflow at small temperatures.
        v = (u - u.amax(-1, keepdim=True)) / temperature
        p = (v - _threshold(v)).relu()
        ctx.save_for_backward(p, temperature, lam)
        return p

    @staticmethod
    def backward(ctx: Any, d_p: Tensor) -> tuple[Tensor, Tensor]:
        p, temperature, lam = ctx.saved_tensors
        support = (p > 0).to(p.dtype)
        size = support.sum(-1, keepdim=True)
        kept = d_p * support
        d_u = support * (d_p - kept.sum(-1, keepdim=True) / size) / temperature
        d_lam = (kept * (p - 1 / size)).sum(-1, keepdim=True) / temperature
        return d_u, d_lam * (1 - lam >= EPSILON)


def _threshold(v: Tensor) -> Tensor:
    """``(..., 1)`` tau such that ``relu(v - tau)`` sums to 1."""
    ordered = v.sort(-1, descending=True).values
    total = ordered.cumsum(-1)
    place = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    size = (1 + place * ordered > total).sum(-1, keepdim=True).clamp_min(1)
    return (total.gather(-1, size - 1) - 1) / size


def lowest_lambda(u: Tensor, k: int) -> Tensor:
    """``(...)``: the lambda from which on at most k of the experts with scores ``(..., E)`` are active.

    ``1 - sum over i <= k of (u_(i) - u_(k+1))`` with descending scores; minus infinity for k = E.
    """
    if k >= u.shape[-1]:
        return torch.full_like(u[..., 0], -math.inf)
    ordered = u.sort(-1, descending=True).values
    return 1 - (ordered[..., :k] - ordered[..., k : k + 1]).sum(-1)
