"""Balance without a loss: a bias per expert decides who is selected, and follows the counts (SMoRA, FlyLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.layers.routing import Router, Routing, Tokens


class BiasedRouter(Router):
    """Counts the tokens of every expert in training, and moves ``bias (E,)`` once per optimiser step.

    ``bias += rate * sign(mean(counts) - counts)``. Padding is not counted, nor are recomputations or evaluation. The
    bias is saved with the adapter and is no parameter, so that no optimiser decays it.
    """

    reads = frozenset({"real"})
    bias: Tensor

    def _start_bias(self, experts: int, rate: float) -> None:
        self.rate = rate
        self.register_buffer("bias", torch.zeros(experts))
        # No buffer: distributed training hands process 0's buffers to all before every pass.
        self._counts: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> BiasedRouter:
        before = self.bias
        super()._apply(fn, recurse)
        # Steps of 1e-5 are lost in half precision.
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        self.bias = before.to(self.bias.device, wide)
        return self

    @torch.no_grad()
    def observe(self, routing: Routing, tokens: Tokens) -> None:
        chosen = routing.chosen.flatten(0, -2)
        if tokens.real is not None:
            chosen = chosen & tokens.real.reshape(-1, 1).bool()
        found = chosen.sum(0)
        self._counts = found if self._counts is None else self._counts + found

    def take_counts(self) -> Tensor:
        """``(E,)`` int64, how often each expert was chosen since the last call."""
        counts, self._counts = self._counts, None
        return torch.zeros_like(self.bias, dtype=torch.int64) if counts is None else counts.to(self.bias.device)

    @torch.no_grad()
    def move_bias(self, counts: Tensor) -> None:
        """One step towards experts that were chosen less than the mean of ``counts (E,)``."""
        wide = counts.double()
        self.bias += self.rate * (wide.mean() - wide).sign().to(self.bias.dtype)
