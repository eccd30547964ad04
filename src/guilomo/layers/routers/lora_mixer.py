"""LoRA-Mixer: experts trained on their own tasks first, then a router over them (arXiv 2507.00029)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.options import expect_choice, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.task import known_tasks
from guilomo.layers.routers.topk import largest, softmax_over_kept
from guilomo.layers.routing import Routing, Tokens, softmax_over_experts


class LoraMixerRouter(LinearRouter):
    """In stage hard every token of a row goes to the expert of the row's task; in stage soft the router decides.

    Soft: the softmax over all experts in training, and over the K largest in evaluation (second-hand: K = 3). The
    losses of that stage are ``balance_loss: rsl``, of both signs of the entropy, and ``divergence``, whose aim is what
    the text of the paper describes. Go on to the second stage by loading the adapter with
    ``router_options={'stage': 'soft'}`` in its config.

    Options:
        stage: hard or soft.
    """

    reads = frozenset({"task"})

    def __init__(self, *args: Any, stage: str = "soft") -> None:
        super().__init__(*args)
        self.stage = stage

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_choice(option("stage"), options["stage"], ("hard", "soft"))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        if self.stage == "hard":
            own = F.one_hot(known_tasks(tokens.tasks(self.experts), self.experts), self.experts)
            # Times 0: distributed training wants a gradient, if of 0, of every parameter.
            return Routing(own.to(logits.dtype) + 0 * logits, logits, own.bool())
        if self.training or self.top_k == self.experts:
            return Routing(softmax_over_experts(logits), logits)
        _, kept = largest(logits.detach(), self.top_k)
        return Routing(softmax_over_kept(logits, kept), logits, kept)
