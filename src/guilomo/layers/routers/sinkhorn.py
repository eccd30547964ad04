"""Selective Sinkhorn routing, SSR (arXiv 2511.08972): now and then in training, a balanced assignment of the batch.

    Pi = argmax <C, Pi> + xi H(Pi)   with rows that sum to 1 and columns that sum to T/E

Experimental: we know the method from two second-hand sources that agree on the above and not on much else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.topk import TopKRouter, largest
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens, softmax_over_experts


class SinkhornRouter(TopKRouter):
    """Top-k routing; in training, with probability `q` per pass and module, the K largest of Pi, renormalised.

    Pi couples all real tokens of the batch, later ones included, so that in a causal language model routing sees the
    future there; in evaluation it is never used. Columns are balanced over the batch of one process. A balanced Pi does
    not make the K-largest counts balanced. Balance losses and the z-loss are refused, as the method does without. Under
    `torch.compile` the coin and Pi break the graph.

    Options:
        q: probability of a balanced pass; the sources say 0.001 to 0.01.
        xi: weight of the entropy; 0.05 is one source's value for cost softmax, 0.5 to 1 another's for an unnamed cost.
        cost: C is the 'softmax' of the logits or the 'linear' logits themselves.
        grad: 'detach' Pi, the router then learning in the other passes, or 'unroll' the iterations.
        iterations, tolerance: where to stop: after so many rounds, or when no marginal is off by more than this.
    """

    searchable = False
    balanced = False
    reads = frozenset({"real"})

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        q: float = 0.01,
        xi: float = 0.05,
        cost: str = "softmax",
        grad: str = "detach",
        iterations: int = 100,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        self.q, self.xi, self.cost, self.grad = q, xi, cost, grad
        self.iterations, self.tolerance = iterations, tolerance

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_number(option("q"), options["q"], at_least=0, at_most=1)
        expect_number(option("xi"), options["xi"], above=0)
        expect_choice(option("cost"), options["cost"], ("softmax", "linear"))
        expect_choice(option("grad"), options["grad"], ("detach", "unroll"))
        expect_number(option("iterations"), options["iterations"], at_least=1, whole=True)
        expect_number(option("tolerance"), options["tolerance"], at_least=0)

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        plain = super().route(logits, tokens)
        if not self.training or self.q == 0 or not _heads(self.q):
            return plain
        assignment = self._assignment(logits, tokens.real)
        _, kept = largest(assignment.detach(), self.top_k)
        chosen = torch.zeros_like(plain.chosen).scatter(-1, kept, True)
        weights = assignment * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        if tokens.real is None:
            return Routing(weights, logits, kept)
        real = tokens.real.bool()[..., None]
        return Routing(torch.where(real, weights, plain.weights), logits, torch.where(real, chosen, plain.chosen))

    def _assignment(self, logits: Tensor, real: Tensor | None) -> Tensor:
        scores = logits.detach() if self.grad == "detach" else logits
        cost = softmax_over_experts(scores) if self.cost == "softmax" else scores
        counted = None if real is None else real.reshape(-1).bool()
        pi: Tensor = sinkhorn(cost.flatten(0, -2), self.xi, counted, self.iterations, self.tolerance)
        return pi.view_as(logits)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _heads(chance: float) -> bool:
    """A coin from the host's generator: no wait for a device, and a recomputation sees the same side."""
    return float(torch.rand((), device="cpu")) < chance


# How many rounds there are depends on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def sinkhorn(
    cost: Tensor, xi: float, real: Tensor | None = None, iterations: int = 100, tolerance: float = 1e-4
) -> Tensor:
    """``(T, E)``: the balanced assignment above, in the log domain.

    The rows' scaling comes last, so that rows sum to 1 exactly and what is missing is in the columns.

    Args:
        cost: ``(T, E)``. xi: weight of the entropy.
        real: ``(T,)`` bool; other tokens have no part in the columns' sums, and their rows mean nothing.
        iterations, tolerance: the host looks at the columns' error after every tenth round.
    """
    kernel = cost / xi
    v = kernel.new_zeros(kernel.shape[-1])
    outside = kernel.new_zeros(len(kernel))
    count = kernel.new_full((), float(len(kernel)))
    if real is not None:
        outside, count = outside.masked_fill(~real, -math.inf), real.sum().to(kernel.dtype).clamp_min(1)
    wanted = (count / kernel.shape[-1]).log()
    u = -kernel.logsumexp(-1)
    for done in range(1, iterations + 1):
        v = wanted - (kernel + (u + outside)[:, None]).logsumexp(0)
        u = -(kernel + v).logsumexp(-1)
        if done % 10 == 0 and bool(_columns_off(kernel, u + outside, v, wanted) <= tolerance):
            break
    return (kernel + u[:, None] + v).exp()


def _columns_off(kernel: Tensor, u: Tensor, v: Tensor, wanted: Tensor) -> Tensor:
    columns = (kernel.detach() + u.detach()[:, None] + v.detach()).exp().sum(0)
    return (columns - wanted.exp()).abs().max()
