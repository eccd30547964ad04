"""How a router loss enters the gradient: an identity on the layer's output whose backward also feeds the loss.

A loss added to ``outputs.loss`` is lost under trainers that compute their own loss and under reentrant gradient
checkpointing. An identity on the activations is in the graph whatever the trainer does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LossScale:
    """What one unit of auxiliary loss is worth in the backward pass now running.

    The trainer scales its loss (gradient accumulation, token share, mixed precision); the auxiliary losses must
    follow. `guilomo.tuner.loss_scale` measures the factor; without a trainer it is 1.

    Attributes:
        value: ``()`` float32. Changed in place only: a compiled backward follows a tensor's change, not an attribute's.
        unmeasured: the factor where none can be measured.
    """

    def __init__(self) -> None:
        self.value = torch.ones(())
        self.unmeasured = 1.0

    def reset(self, device: torch.device) -> None:
        """Forgets what the last pass measured, and moves to where the next one runs."""
        # In a compiled forward a new tensor would be the graph's own, which its backward cannot change.
        if self.value.device != device and not torch.compiler.is_compiling():
            self.value = self.value.to(device)
        self.value.fill_(self.unmeasured)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
        ctx.scale = scale
        ctx.like = (loss.dtype, loss.device)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        # A second derivative would pass here again and feed the loss twice; it needs the loss itself, added up.
        dtype, device = ctx.like
        return dy, ctx.scale.value.to(device=device, dtype=dtype, copy=True), None


def attach_loss(y: Tensor, loss: Tensor, scale: LossScale) -> Tensor:
    """Returns `y` unchanged; its backward adds ``scale.value * d loss`` to the gradients (ours, after Megatron).

    Raises:
        RuntimeError: in the backward, when a second derivative is taken through it.
    """
    out: Tensor = _AttachLoss.apply(y, loss, scale)
    return out
