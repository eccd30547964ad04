"""MeteoRA's gates over adapters that exist already (arXiv 2405.13053, ICLR 2025)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.layers.options import expect_number, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.task import known_tasks
from guilomo.layers.routers.topk import largest, softmax_over_kept
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens


class MeteoraRouter(LinearRouter):
    """``w = softmax(top-k logits / T)``: with k = 1 the weight is 1, and only the router's own loss teaches the gate.

    The own loss is the cross-entropy between a token's logits and its row's task, expert e being the adapter of task e;
    the released code weighs it by 50. Tasks are needed in training with such a weight, and nowhere else.

    Options:
        temperature: T. 1 for single tasks; the released evaluation of composed tasks has 15, 20 and 30.
    """

    own_loss = True
    reads = frozenset({"task"})

    def __init__(
        self, in_features: int, experts: int, top_k: int, place: Place = NOWHERE, *, temperature: float = 1.0
    ) -> None:
        super().__init__(in_features, experts, top_k, place)
        self.temperature = temperature
        nn.init.normal_(self.weight)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_number(option("temperature"), options["temperature"], above=0)

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        _, kept = largest(logits.detach(), self.top_k)
        weights = softmax_over_kept(logits / self.temperature, kept)
        return Routing(weights, logits, kept, self._penalty(logits, tokens) if self.training else None)

    def _penalty(self, logits: Tensor, tokens: Tokens) -> Tensor | None:
        if tokens.task is None:
            return None
        target = known_tasks(tokens.tasks(self.experts), self.experts)
        return F.cross_entropy(logits.flatten(0, -2), target.reshape(-1), reduction="none").view(target.shape)
