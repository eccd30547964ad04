"""Makes auxiliary losses follow the trainer's scaling of the main loss.

Trainers divide the loss by accumulation steps, by the number of label tokens of all micro-batches, or multiply it for
mixed precision, after the model returned it. A tap on the returned loss sees the product of all of these as its
incoming gradient, before any layer's backward runs.

Two outputs are tapped: ``loss``, and ``log_probs`` of the fused outputs of TRL's SFTTrainer, which computes its own
token-level loss from them. There, a mean negative log-likelihood over N tokens sends ``-1/N`` to each of its tokens,
so the negated sum is this micro-batch's share of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.layers.attach import LossScale


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: LossScale, share: float | Tensor, sign: float) -> Tensor:
        ctx.scale, ctx.share, ctx.sign = scale, share, sign
        # A clone, not a view: trainers multiply the loss in place, which autograd refuses on views.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.scale.value = grad.detach().sum().float() * ctx.sign * ctx.share
        return grad, None, None, None


def token_share(inputs: dict[str, Any]) -> float | Tensor:
    """This micro-batch's share of the label tokens of the whole step, when the trainer passes their number.

    A language model that is given ``num_items_in_batch`` N returns ``sum of token losses / N``: its upstream gradient
    is 1 for every micro-batch, and an auxiliary mean over the micro-batch's tokens must be weighted by its share.
    """
    total, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if total is None or not isinstance(labels, Tensor) or labels.dim() < 2:
        return 1.0
    return (labels[..., 1:] != -100).sum() / total


def measure_loss_scale(output: Any, scale: LossScale, share: float | Tensor) -> Any:
    """Taps the output's loss so that its backward sets `scale`; returns the output."""
    for name, sign in (("loss", 1.0), ("log_probs", -1.0)):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and value.requires_grad and (name == "log_probs" or value.dim() == 0):
            setattr(output, name, _Tap.apply(value, scale, share if name == "loss" else 1.0, sign))  # type: ignore[no-untyped-call]
    return output
