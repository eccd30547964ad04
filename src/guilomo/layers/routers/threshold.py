"""AdaMoLE: experts above a threshold that the token decides (arXiv 2405.00361)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.errors import invalid
from guilomo.layers.options import expect_number, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routing import (
    NOWHERE,
    Place,
    Routing,
    Tokens,
    accumulation_dtype,
    softmax_over_experts,
    without_autocast,
)


class ThresholdRouter(LinearRouter):
    """``w = (g - tau)_+ / sum (g - tau)_+`` with ``g = softmax(W x)`` and ``tau = tau_max sigmoid(v x + c)``.

    As long as tau_max is at most 1/E some expert is above the threshold, unless all g are equal to it; then all get 1/E
    (the guard is ours).

    Options:
        max_threshold: tau_max; unset, as published: 1/E of the module.
    """

    dense = True

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        max_threshold: float | None = None,
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        if max_threshold is not None and max_threshold > 1 / experts:
            remedy = "Above that a token may have no expert at all."
            raise invalid(option("max_threshold"), max_threshold, f"at most 1/{experts} with {experts} experts", remedy)
        self.max_threshold = 1 / experts if max_threshold is None else max_threshold
        self.threshold = nn.Parameter(torch.empty(1, in_features))
        self.threshold_bias = nn.Parameter(torch.zeros(1))
        nn.init.kaiming_uniform_(self.threshold, a=math.sqrt(5))

    @classmethod
    def check_options(cls, **options: Any) -> None:
        if options["max_threshold"] is not None:
            expect_number(option("max_threshold"), options["max_threshold"], at_least=0, at_most=0.5)

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        return experts * in_features + in_features + 1

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        above = softmax_over_experts(logits) - self._tau(tokens.x).to(logits.dtype)
        kept = above.detach() > 0
        # Where nobody is above, every g is the threshold.
        nobody = ~kept.any(-1, keepdim=True)
        above = torch.where(nobody, torch.ones_like(above), above.relu())
        return Routing(above / above.sum(-1, keepdim=True), logits, kept | nobody)

    def _tau(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x.device.type):
            y = F.linear(x.to(dtype), self.threshold.to(dtype), self.threshold_bias.to(dtype))
        return self.max_threshold * y.sigmoid()
