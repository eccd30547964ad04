"""HMoRA: a router of tokens and a router of tasks, mixed layer by layer (ICLR 2025, code ``LiaoMengqi/HMoRA``)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.task import check_task_count, known_tasks
from guilomo.layers.routers.topk import largest
from guilomo.layers.routing import (
    NOWHERE,
    Place,
    Router,
    Routing,
    Tokens,
    accumulation_dtype,
    softmax_over_experts,
    without_autocast,
)


class HmoraRouter(Router):
    """``g = (1 - s) softmax(MLP(x)) + s softmax(table[task])`` with ``s = sigmoid(a)``, a learned by every module.

    a starts at ``-lean`` in the first layer and at ``+lean`` in the last: deeper layers lean on the task. The table is
    one for all modules of equal expert count. With top-k below the number of experts, the K largest of g are kept. The
    loss that goes with it is ``balance_loss: divergence``, the scale ``scaling: alpha_over_sqrt_r``.

    Ours, for want of what was published: tasks come as ids and not from an encoder of prompts, and the MLP is
    ``W2 relu(W1 x)`` without biases.

    Options:
        tasks: their number. hidden: width of the MLP. lean: see above; 2 as released.
        select: 'renormalize' the kept g to sum 1, or 'softmax' over them, which as released takes the softmax of a
            softmax and turns (.9, .1) into (.69, .31).
    """

    reads = frozenset({"task"})

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        tasks: int | None = None,
        hidden: int = 32,
        lean: float = 2.0,
        select: str = "renormalize",
    ) -> None:
        super().__init__()
        assert isinstance(place.shared, TaskTable), "made by `shared` and handed to every router of as many experts"
        self._held = (place.shared,)  # in a tuple, so that it is not registered: one module alone saves and trains it
        self.experts, self.top_k, self.select = experts, top_k, select
        self.down = nn.Parameter(torch.empty(hidden, in_features))
        self.up = nn.Parameter(torch.empty(experts, hidden))
        for weight in (self.down, self.up):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.mix = nn.Parameter(torch.full((1,), lean * (2 * place.depth - 1)))

    @classmethod
    def check_options(cls, **options: Any) -> None:
        check_task_count(options["tasks"])
        expect_number(option("hidden"), options["hidden"], at_least=1, whole=True)
        expect_number(option("lean"), options["lean"])
        expect_choice(option("select"), options["select"], ("renormalize", "softmax"))

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        found: int = options["hidden"] * (in_features + experts) + 1
        return found

    @classmethod
    def shared_key(cls, experts: int, in_features: int) -> Hashable:
        return experts

    @classmethod
    def shared(cls, experts: int, in_features: int, **options: Any) -> TaskTable:
        return TaskTable(options["tasks"], experts)

    @classmethod
    def shared_parameters(cls, experts: int, in_features: int, **options: Any) -> int:
        found: int = options["tasks"] * experts
        return found

    def logits(self, x: Tensor) -> Tensor:
        """``(..., E)`` scores of the token router."""
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x.device.type):
            return F.linear(F.linear(x.to(dtype), self.down.to(dtype)).relu(), self.up.to(dtype))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        share = self.mix.to(logits.dtype).sigmoid()
        by_task = self._held[0](tokens.tasks(len(self._held[0].scores))).to(logits.dtype)
        g = (1 - share) * softmax_over_experts(logits) + share * by_task
        scores = g.clamp_min(torch.finfo(g.dtype).tiny).log()  # whose softmax is g, for losses and reports
        if self.top_k == self.experts:
            return Routing(g, scores)
        _, kept = largest(g.detach(), self.top_k)
        chosen = torch.zeros_like(g, dtype=torch.bool).scatter(-1, kept, True)
        raw = g * chosen if self.select == "renormalize" else g.exp() * chosen
        return Routing(raw / raw.sum(-1, keepdim=True), scores, chosen)


class TaskTable(nn.Module):
    """Weights ``(..., E)`` of tasks ``(...)``: the softmax of a row of scores for each task, all equal at the start."""

    def __init__(self, tasks: int, experts: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(tasks, experts))

    def forward(self, tasks: Tensor) -> Tensor:
        home = self.scores.device
        weights = softmax_over_experts(self.scores.to(accumulation_dtype(self.scores.dtype)))
        return weights[known_tasks(tasks.to(home), len(self.scores))].to(tasks.device)
