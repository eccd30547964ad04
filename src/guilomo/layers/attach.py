"""How a router loss enters the gradient: an identity on the layer's output whose backward also feeds the loss.

A loss added to ``outputs.loss`` is lost under trainers that compute their own loss and under reentrant gradient
checkpointing. An identity on the activations is in the graph whatever the trainer does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """What one unit of auxiliary loss is worth in the backward pass now running.

    The trainer scales its loss (gradient accumulation, token share, mixed precision); the auxiliary losses must
    follow. `guilomo.tuner.loss_scale` measures the factor; without a trainer it is 1.
    """

    def __init__(self) -> None:
        self.value: float | Tensor = 1.0


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
        ctx.scale = scale
        ctx.like = (loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return dy, torch.as_tensor(ctx.scale.value, dtype=dtype, device=device).clone(), None


def attach_loss(y: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
    """Returns `y` unchanged; its backward adds ``scale.value * d loss`` to the gradients (ours, after Megatron)."""
    out: Tensor = _AttachLoss.apply(y, loss, scale)
    return out
