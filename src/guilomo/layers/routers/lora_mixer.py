"""LoRA-Mixer: experts trained on their own tasks first, then a router over them (arXiv 2507.00029)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from guilomo.errors import invalid
from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.task import known_tasks
from guilomo.layers.routers.topk import largest, softmax_over_kept
from guilomo.layers.routing import Routing, Tokens, softmax_over_experts


class LoraMixerRouter(LinearRouter):
    """In stage hard every token of a row goes to the expert of the row's task; in stage soft the router decides.

    Soft: the softmax over all experts in training, and over the K largest in evaluation (second-hand: K = 3). The
    losses of that stage are ``balance_loss: rsl``, of both signs of the entropy, and ``divergence``, whose aim is what
    the text of the paper describes. Both stages in one training are `hard_share`; or go on to the second one by loading
    the adapter with ``router_options={'stage': 'soft'}`` in its config.

    Options:
        stage: hard or soft.
        hard_share: of the steps of a training that are hard, before the soft ones (second-hand: 40,000 rows, then 2,000
            to 4,000). It needs somebody who tells how far the training is, see `guilomo.tuner.follow_training`.
        preserve: weight of the squared distance of the experts from where they were when the soft stage began, the
            paper's L_pres; its beta is not known to us. See `guilomo.training.RouterStageCallback`.
    """

    reads = frozenset({"task"})

    def __init__(self, *args: Any, stage: str = "soft", hard_share: float = 0.0, preserve: float = 0.0) -> None:
        super().__init__(*args)
        self.stage = stage
        self.hard_share = hard_share
        self.preserve = preserve

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_choice(option("stage"), options["stage"], ("hard", "soft"))
        expect_number(option("hard_share"), options["hard_share"], at_least=0, at_most=1)
        expect_number(option("preserve"), options["preserve"], at_least=0)
        if options["hard_share"] and options["stage"] == "hard":
            remedy = "Leave stage out: the share says when it changes, and what comes after is soft."
            raise invalid(option("stage"), "hard", "soft where hard_share is set", remedy)

    def follow(self, progress: float) -> None:
        if self.hard_share:
            self.stage = "hard" if progress < self.hard_share else "soft"

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        if self.stage == "hard":
            own = F.one_hot(known_tasks(tokens.tasks(self.experts), self.experts), self.experts)
            # Times 0: distributed training wants a gradient, if of 0, of every parameter.
            return Routing(own.to(logits.dtype) + 0 * logits, logits, own.bool())
        if self.training or self.top_k == self.experts:
            return Routing(softmax_over_experts(logits), logits)
        _, kept = largest(logits.detach(), self.top_k)
        return Routing(softmax_over_kept(logits, kept), logits, kept)
