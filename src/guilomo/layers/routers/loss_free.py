"""SMoRA: every rank, or block of ranks, is an expert, balanced without a loss (arXiv 2501.15103)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.biased import BiasedRouter
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.topk import largest
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens


class LossFreeRouter(BiasedRouter, LinearRouter):
    """``s = sigmoid(W x)``; of ``s + bias`` the K largest are kept, and ``w_e = K s_e / sum of kept s``.

    An expert is a block of ranks, of one rank in the published setting (64 experts of rank 1, K = 8). Weights sum to K,
    where other routers' sum to 1; the published scale is alpha / (K ranks), so that ``lora_alpha`` should be that with
    ``scaling: constant``. With K = 1 every weight is 1, and nothing but a balance loss teaches the router.

    Options:
        rate: of the bias, per optimiser step.
        bias_in_gate: whether the weights are made of ``s + bias`` as well, as in the released code; by default the bias
            selects only.
    """

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        rate: float = 1e-5,
        bias_in_gate: bool = False,
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        self.bias_in_gate = bias_in_gate
        self._start_bias(experts, rate)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_number(option("rate"), options["rate"], at_least=0)
        expect_choice(option("bias_in_gate"), options["bias_in_gate"], (True, False))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        scores = logits.sigmoid()
        selecting = scores + self.bias.to(scores.dtype)
        _, kept = largest(selecting.detach(), self.top_k)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
        raw = (selecting if self.bias_in_gate else scores) * chosen
        return Routing(self.top_k * raw / raw.sum(-1, keepdim=True), logits, kept)
