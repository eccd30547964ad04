"""Makes auxiliary losses follow the trainer's scaling of the main loss.

Trainers divide the loss by accumulation steps, by the number of label tokens of all micro-batches, or multiply it for
mixed precision, after the model returned it. A tap on the returned loss sees the product of all of these as its
incoming gradient, before any layer's backward runs.

Two outputs are tapped: ``loss``, and ``log_probs`` of the fused outputs of TRL's SFTTrainer, which computes its own
token-level loss from them. There, a mean negative log-likelihood over N tokens sends ``-1/N`` to each of its tokens,
so the negated sum over the labelled ones is this micro-batch's share of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from guilomo.layers.attach import LossScale


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: LossScale, weight: float | Tensor) -> Tensor:
        ctx.scale, ctx.weight = scale, weight
        # A clone, not a view: trainers multiply the loss in place, which autograd refuses on views.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.detach() * ctx.weight
        scale = parts.sum().float()
        if parts.dim():
            # Preference losses push some log-probabilities down: the sum then says nothing about the scale.
            scale = torch.where((parts < 0).any(), ctx.scale.unmeasured, scale)
        ctx.scale.value.copy_(scale)
        return grad, None, None


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
    loss, log_probs = getattr(output, "loss", None), getattr(output, "log_probs", None)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0:
        output.loss = _Tap.apply(loss, scale, share)
    label_mask = getattr(output, "label_mask", None)
    if isinstance(log_probs, Tensor) and log_probs.requires_grad and isinstance(label_mask, Tensor):
        # Positions without a label have the constant log-probability 0, and a gradient like all others.
        output.log_probs = _Tap.apply(log_probs, scale, -label_mask.to(log_probs.dtype))
    return output
