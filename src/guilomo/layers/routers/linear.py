"""The scores shared by the trained routers: one bias-free row per expert, ``u = W x`` (MoLA, arXiv 2402.08562)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.layers.routing import NOWHERE, Place, Router, accumulation_dtype, without_autocast


class LinearRouter(Router):
    """Scores ``logits = x W^T`` with ``W (E, I)``, Kaiming-uniform(a=sqrt 5) at the start."""

    def __init__(self, in_features: int, experts: int, top_k: int, place: Place = NOWHERE) -> None:
        super().__init__()
        self.experts = experts
        self.top_k = experts if self.dense else top_k
        self.weight = nn.Parameter(torch.empty(experts, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        return experts * in_features

    @property
    def score_rows(self) -> Tensor:
        return self.weight

    def logits(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        # Autocast would turn the product back into half precision, which is what the cast is there to avoid.
        with without_autocast(x.device.type):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}, in_features={self.weight.shape[1]}"
