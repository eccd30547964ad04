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
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from guilomo.layers.attach import LossScale


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: LossScale, share: float | Tensor, sign: float) -> Tensor:
        ctx.scale, ctx.share, ctx.sign = scale, share, sign
        # A clone, not a view: trainers multiply the loss in place, which autograd refuses on views.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scale = grad.detach().sum().float() * ctx.sign * ctx.share
        if ctx.sign < 0:
            # Preference losses push some log-probabilities down: the sum then says nothing about the scale.
            scale = torch.where((grad > 0).any(), 1.0, scale)
        ctx.scale.value = scale
        return grad, None, None, None


def token_share(model: nn.Module, inputs: dict[str, Any]) -> float | Tensor:
    """This micro-batch's share of the labels of the whole step, when the trainer passes their number.

    A model that is given ``num_items_in_batch`` N returns ``sum of losses / N``: its upstream gradient is 1 for every
    micro-batch, and an auxiliary mean over the micro-batch must be weighted by its share. Labels are counted as
    transformers' Trainer counts N: causal language models predict no first token, all others use every label.
    """
    total, labels, shifted = (inputs.get(k) for k in ("num_items_in_batch", "labels", "shift_labels"))
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    if isinstance(shifted, Tensor):
        labels = shifted
    elif labels.dim() > 1 and _shifts_labels(model):
        labels = labels[..., 1:]
    share: Tensor = (labels != -100).sum() / total
    return share


def _shifts_labels(model: nn.Module) -> bool:
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def measure_loss_scale(output: Any, scale: LossScale, share: float | Tensor) -> Any:
    """Taps the output's loss so that its backward sets `scale`; returns the output."""
    for name, sign in (("loss", 1.0), ("log_probs", -1.0)):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and value.requires_grad and (name == "log_probs" or value.dim() == 0):
            setattr(output, name, _Tap.apply(value, scale, share if name == "loss" else 1.0, sign))
    return output
