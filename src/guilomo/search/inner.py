"""The inner optimiser as the hypergradients need it: its exact state, one virtual step, and that step's Jacobian."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guilomo.search.config import SearchConfig


def make_optimizer(parameters: Iterable[Tensor], config: SearchConfig) -> torch.optim.Optimizer:
    """The optimiser of the weights."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


@dataclass
class Snapshot:
    """A bit-exact copy of weights and random numbers. Nothing in a hypergradient touches ``.grad`` or the optimiser."""

    weights: list[Tensor]
    rng: Tensor
    cuda_rng: list[Tensor]

    @classmethod
    def take(cls, parameters: list[Tensor]) -> Snapshot:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls([p.detach().clone() for p in parameters], torch.get_rng_state(), cuda)

    def restore_rng(self) -> None:
        """Rewinds the random numbers only, so that paired passes draw the same dropout."""
        torch.set_rng_state(self.rng)
        if self.cuda_rng:
            torch.cuda.set_rng_state_all(self.cuda_rng)

    @torch.no_grad()
    def restore_weights(self, parameters: list[Tensor]) -> None:
        for p, w in zip(parameters, self.weights, strict=True):
            p.copy_(w)

    def restore(self, parameters: list[Tensor]) -> None:
        self.restore_weights(parameters)
        self.restore_rng()


def virtual_update(
    w: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], adam: bool
) -> tuple[Tensor, Tensor]:
    """One optimiser step on one tensor, as a differentiable function of `gradient`.

    Args:
        w, gradient: equal shapes; state: the optimiser's state of `w` before the step; group: its options.
        adam: AdamW if true, plain SGD otherwise.

    Returns:
        The updated tensor, and the diagonal ``-d w' / d gradient``. Where Adam's second moment is exactly zero its
        step has no derivative, and 0 is used.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if not adam:
        return w - lr * (gradient + decay * w), torch.full_like(gradient, lr)
    beta1, beta2 = group["betas"]
    t = float(state["step"]) + 1 if state else 1.0
    m = beta1 * (state["exp_avg"] if state else 0.0) + (1 - beta1) * gradient
    v = beta2 * (state["exp_avg_sq"] if state else 0.0) + (1 - beta2) * gradient.square()
    correct1, correct2 = 1 - beta1**t, 1 - beta2**t
    moved = v > 0
    root = torch.where(moved, v, 1.0).sqrt() / math.sqrt(correct2)
    below = torch.where(moved, root + group["eps"], 1.0)
    direction = torch.where(moved, m / correct1 / below, 0.0)
    slope = (1 - beta1) / correct1 / below - (m / correct1) * (1 - beta2) * gradient / (
        correct2 * root * below.square()
    )
    return w * (1 - lr * decay) - lr * direction, lr * torch.where(moved, slope, 0.0)


def clip_factor(gradients: list[Tensor], max_norm: float | None) -> float | Tensor:
    """What gradient clipping multiplies gradients with; its own derivative is neglected everywhere."""
    if max_norm is None:
        return 1.0
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.detach()) for g in gradients]))
    factor: Tensor = max_norm / (norm + 1e-6)
    return factor.clamp(max=1.0)
